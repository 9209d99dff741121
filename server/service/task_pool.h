// A few threads for work that neither gRPC's threads nor the executor should do.
//
// Threading: Post() is safe from any thread and never waits.
// Memory: one entry per posted task. Every user posts at most one task at a time, so
// that the queue is bounded by the calls that are open.
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
  // Runs what was posted, then stops.
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
