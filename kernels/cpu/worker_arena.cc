#include "cpu/worker_arena.h"

#include <tbb/global_control.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <cstddef>
#include <memory>

namespace pbs::cpu {

struct WorkerArena::Arena {
  explicit Arena(int num_threads)
      : allowed(tbb::global_control::max_allowed_parallelism,
                static_cast<size_t>(num_threads)),
        tasks(num_threads) {}
  // oneTBB otherwise stops at the CPUs it counts, which a container's quota may hide.
  tbb::global_control allowed;
  tbb::task_arena tasks;
};

WorkerArena::WorkerArena(int num_threads)
    : arena_(std::make_unique<Arena>(num_threads)) {}

WorkerArena::~WorkerArena() = default;

void WorkerArena::RunTasks(int count, Task task, void* context) {
  arena_->tasks.execute([&] {
    tbb::parallel_for(
        0, count, [&](int i) { task(context, i); }, tbb::simple_partitioner());
  });
}

}  // namespace pbs::cpu
