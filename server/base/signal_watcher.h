// Catches signals on a thread of its own.
//
//   SIGTERM, SIGINT         the first asks the process to stop; the second ends it at
//                           once with status 128 + signal
//   SIGHUP                  asks the process to stop, however often it comes; without
//                           effect where it was ignored at start, as nohup does
//   SIGUSR1, SIGUSR2        without effect
//   SIGPIPE, SIGXFSZ        ignored: a write answers with its error
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
  // Blocks the caught signals in this thread.
  SignalWatcher();
  // Leaves the signals blocked.
  ~SignalWatcher();
  SignalWatcher(const SignalWatcher&) = delete;
  SignalWatcher& operator=(const SignalWatcher&) = delete;

  // True once the process was asked to stop; for code that polls between its steps.
  const std::atomic<bool>& stop_flag() const { return stop_; }
  bool stop_requested() const { return stop_.load(); }
  void WaitForStop();
  // Asks the process to stop, as the first signal does, but does not count as a signal:
  // the next signal is still the first.
  void RequestStop();

 private:
  void Watch();

  const sigset_t signals_;
  std::atomic<bool> stop_ = false;
  std::atomic<bool> ending_ = false;  // our destructor runs
  Mutex mutex_;
  CondVar stopped_;
  std::thread thread_;
};

}  // namespace pbs::server
