#include "server/base/thread_check.h"

#include <cstddef>
#include <cstdint>
#include <latch>
#include <system_error>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"

namespace pbs::server {

absl::Status TryThreads(int32_t count) {
  std::latch all_tried(1);
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(count));
  absl::Status status;
  try {
    while (threads.size() < static_cast<size_t>(count)) {
      threads.emplace_back([&all_tried] { all_tried.wait(); });
    }
  } catch (const std::system_error& error) {
    status = absl::ResourceExhaustedError(absl::StrCat(
        "the system refused thread ", threads.size() + 1, " of ", count, " (",
        error.what(),
        "); raise the limit (pids limit of the container, ulimit -u, ulimit -v), or "
        "lower cpu.threads"));
  }
  all_tried.count_down();
  for (std::thread& thread : threads) thread.join();
  return status;
}

}  // namespace pbs::server
