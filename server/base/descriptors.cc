#include "server/base/descriptors.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <limits>
#include <system_error>

namespace pbs::server {
namespace {

int64_t Count(rlim_t limit) {
  constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  return limit == RLIM_INFINITY ? kNoLimit : static_cast<int64_t>(limit);
}

}  // namespace

int64_t OpenDescriptors() {
  std::error_code failed;
  const std::filesystem::directory_iterator folder("/proc/self/fd", failed);
  return failed ? 0 : std::distance(begin(folder), end(folder));
}

int64_t RaiseDescriptorLimit(int64_t wanted) {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return wanted;
  if (Count(limit.rlim_cur) >= wanted) return Count(limit.rlim_cur);
  rlimit raised = limit;
  raised.rlim_cur = static_cast<rlim_t>(std::min(wanted, Count(limit.rlim_max)));
  if (setrlimit(RLIMIT_NOFILE, &raised) != 0) return Count(limit.rlim_cur);
  return Count(raised.rlim_cur);
}

}  // namespace pbs::server
