// The interface to oneTBB: an arena of worker threads that runs one task on each.
//
// It is in a file of its own because ThreadSanitizer does not see oneTBB's library. The
// file is built without it, so that oneTBB's headers cause no false alarms.
// thread_pool.cc repeats the library's ordering with its own atomics.
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
  // returns when all calls have returned. `task` must not throw.
  void RunTasks(int count, Task task, void* context);

 private:
  struct Arena;
  std::unique_ptr<Arena> arena_;
};

}  // namespace pbs::cpu
