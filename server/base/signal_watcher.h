// Catches SIGTERM and SIGINT on a thread of its own. The first asks the process to
// stop; the second ends it at once with status 128 + signal.
//
// Threading: construct before any other thread starts, since threads inherit the
// blocked signals; one at a time. Everything else is safe from any thread.
#pragma once

#include <atomic>
#include <csignal>
#include <thread>

#include "server/base/mutex.h"

namespace pbs::server {

class SignalWatcher {
 public:
  // Blocks the signals in this thread, ignores SIGPIPE.
  SignalWatcher();
  // Leaves the signals blocked.
  ~SignalWatcher();
  SignalWatcher(const SignalWatcher&) = delete;
  SignalWatcher& operator=(const SignalWatcher&) = delete;

  // For code that looks at a flag between its steps.
  const std::atomic<bool>& stop_flag() const { return stop_; }
  bool stop_requested() const { return stop_.load(); }
  void WaitForStop();
  // Stops as the first signal does, and is none: one that follows is the first.
  void RequestStop();

 private:
  void Watch();

  const sigset_t signals_;
  std::atomic<bool> stop_ = false;
  Mutex mutex_;
  CondVar stopped_;
  std::thread thread_;
};

}  // namespace pbs::server
