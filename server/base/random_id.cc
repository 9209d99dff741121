#include "server/base/random_id.h"

#include <sys/random.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/str_format.h"
#include "pbs/check.h"

namespace pbs::server {
namespace {

void FillRandom(void* data, size_t size) {
  // Up to 256 bytes come whole once the generator is seeded; only the wait for that
  // can be interrupted.
  ssize_t filled = -1;
  do {
    filled = getrandom(data, size, 0);
  } while (filled < 0 && errno == EINTR);
  PBS_CHECK(filled == static_cast<ssize_t>(size));
}

}  // namespace

uint64_t RandomU64() {
  uint64_t value = 0;
  while (value == 0) FillRandom(&value, sizeof(value));
  return value;
}

std::string RandomHandle() {
  uint64_t words[2];
  FillRandom(words, sizeof(words));
  return absl::StrFormat("%016x%016x", words[0], words[1]);
}

}  // namespace pbs::server
