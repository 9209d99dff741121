// Where oneTBB begins: an arena of worker threads that runs one task on each.
//
// Alone in its file because ThreadSanitizer does not see into oneTBB's library: built
// without it, the half of oneTBB that is in headers raises no false alarms.
// thread_pool.cc says in atomics of its own what the library orders.
//
// Threading: RunTasks() from one thread at a time. Memory: the arena's.
#pragma once

#include <memory>

namespace pbs::cpu {

class WorkerArena {
 public:
  // num_threads >= 1, the calling thread included.
  explicit WorkerArena(int num_threads);
  ~WorkerArena();
  WorkerArena(const WorkerArena&) = delete;
  WorkerArena& operator=(const WorkerArena&) = delete;

  using Task = void (*)(void* context, int index);
  // Calls task(context, i) once for every i in [0, count), on any of the threads, and
  // returns when all calls have. `task` must not throw.
  void RunTasks(int count, Task task, void* context);

 private:
  struct Arena;
  std::unique_ptr<Arena> arena_;
};

}  // namespace pbs::cpu
