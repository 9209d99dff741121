// The CPU backend's threads: one oneTBB arena of a fixed size.
//
// Threading: ParallelFor() may be called from one thread at a time and does not nest.
// Memory: the arena's; a call allocates O(num_threads).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/worker_arena.h"

namespace pbs::cpu {

class ThreadPool {
 public:
  // num_threads >= 1, the calling thread included.
  explicit ThreadPool(int num_threads);

  int num_threads() const { return num_threads_; }

  // Calls body(index, worker) once for every index in [0, count) and returns when all
  // calls have returned. Indices are assigned in rising order. `worker` is in [0,
  // num_threads), and two calls never have the same one at once, so that it can select
  // per-worker scratch. `body` must not throw.
  template <class Body>
  void ParallelFor(int64_t count, Body&& body) {
    Run(
        count,
        [](void* context, int64_t index, int worker) {
          (*static_cast<std::remove_reference_t<Body>*>(context))(index, worker);
        },
        &body);
  }

 private:
  using Call = void (*)(void* context, int64_t index, int worker);
  void Run(int64_t count, Call call, void* context);

  const int num_threads_;
  WorkerArena arena_;
};

}  // namespace pbs::cpu
