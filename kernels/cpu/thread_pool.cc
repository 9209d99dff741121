#include "cpu/thread_pool.h"

#include <tbb/global_control.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>

#include "pbs/check.h"

namespace pbs::cpu {

struct ThreadPool::Arena {
  explicit Arena(int num_threads)
      : allowed(tbb::global_control::max_allowed_parallelism,
                static_cast<size_t>(num_threads)),
        tasks(num_threads) {}
  // oneTBB otherwise stops at the CPUs it counts, which a container's quota may hide.
  tbb::global_control allowed;
  tbb::task_arena tasks;
};

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), arena_(std::make_unique<Arena>(num_threads)) {
  PBS_CHECK(num_threads >= 1);
}

ThreadPool::~ThreadPool() = default;

void ThreadPool::Run(int64_t count, Call call, void* context) {
  const int workers = static_cast<int>(std::min<int64_t>(num_threads_, count));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) call(context, i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  arena_->tasks.execute([&] {
    // One task per worker: each drains the shared counter, so work is handed out in
    // order and a worker index is one task's alone.
    tbb::parallel_for(
        0, workers,
        [&](int worker) {
          for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            call(context, i, worker);
          }
        },
        tbb::simple_partitioner());
  });
}

}  // namespace pbs::cpu
