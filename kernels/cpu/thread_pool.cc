#include "cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "pbs/check.h"

namespace pbs::cpu {
namespace {

struct Work {
  const int64_t count;
  void (*const call)(void* context, int64_t index, int worker);
  void* const context;
  std::atomic<int64_t> next{0};
  std::atomic<int> running{0};
};

// One task per worker: each drains the shared counter, so work is handed out in order
// and a worker index is one task's alone.
void Drain(void* opaque_work, int worker) {
  auto& work = *static_cast<Work*>(opaque_work);
  work.running.load(std::memory_order_acquire);
  for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;)
    work.call(work.context, i, worker);
  work.running.fetch_sub(1, std::memory_order_release);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), arena_(num_threads) {
  PBS_CHECK(num_threads >= 1);
}

void ThreadPool::Run(int64_t count, Call call, void* context) {
  const int workers = static_cast<int>(std::min<int64_t>(num_threads_, count));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) call(context, i, 0);
    return;
  }
  Work work = {.count = count, .call = call, .context = context};
  // The caller comes before the tasks and the tasks before the caller; see
  // worker_arena.h.
  work.running.store(workers, std::memory_order_release);
  arena_.RunTasks(workers, Drain, &work);
  PBS_CHECK(work.running.load(std::memory_order_acquire) == 0);
}

}  // namespace pbs::cpu
