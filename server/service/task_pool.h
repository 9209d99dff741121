// A few threads for work that is too long for gRPC's threads and the executor.
//
// Threading: Post() is safe from any thread and never waits.
// Memory: one entry per posted task. Every call posts at most one task at a time, so
// the number of open calls bounds the queue.
#pragma once

#include <deque>
#include <thread>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "server/base/mutex.h"

namespace pbs::server {

class TaskPool {
 public:
  // num_threads >= 1.
  explicit TaskPool(int num_threads);
  // Runs all posted tasks, then stops.
  ~TaskPool();
  TaskPool(const TaskPool&) = delete;
  TaskPool& operator=(const TaskPool&) = delete;

  void Post(absl::AnyInvocable<void()> task);

 private:
  void Work();

  Mutex mutex_;
  CondVar changed_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::deque<absl::AnyInvocable<void()>> tasks_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

}  // namespace pbs::server
