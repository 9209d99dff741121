#include "server/base/signal_watcher.h"

#include <pthread.h>
#include <unistd.h>

namespace pbs::server {
namespace {

constexpr int kEndOfWatch = SIGUSR1;  // from our destructor

sigset_t BlockSignals() {
  std::signal(SIGPIPE, SIG_IGN);
  sigset_t signals;
  sigemptyset(&signals);
  for (int signal : {SIGTERM, SIGINT, kEndOfWatch}) sigaddset(&signals, signal);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return signals;
}

}  // namespace

SignalWatcher::SignalWatcher()
    : signals_(BlockSignals()), thread_([this] { Watch(); }) {}

SignalWatcher::~SignalWatcher() {
  pthread_kill(thread_.native_handle(), kEndOfWatch);
  thread_.join();
}

void SignalWatcher::Watch() {
  int signal = 0;
  bool signalled = false;  // RequestStop() is no signal
  while (sigwait(&signals_, &signal) == 0 && signal != kEndOfWatch) {
    if (signalled) _exit(128 + signal);
    signalled = true;
    RequestStop();
  }
}

void SignalWatcher::RequestStop() {
  MutexLock lock(mutex_);
  stop_.store(true);
  stopped_.NotifyAll();
}

void SignalWatcher::WaitForStop() {
  MutexLock lock(mutex_);
  while (!stop_.load()) stopped_.Wait(mutex_);
}

}  // namespace pbs::server
