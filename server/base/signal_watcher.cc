#include "server/base/signal_watcher.h"

#include <pthread.h>
#include <unistd.h>
#include <csignal>

namespace pbs::server {
namespace {

constexpr int kWake = SIGUSR1;  // what our destructor sends

// A blocked signal reaches sigwait() even where it is ignored.
bool IsIgnored(int signal) {
  struct sigaction action = {};
  return sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN;
}

sigset_t BlockSignals() {
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  sigset_t signals;
  sigemptyset(&signals);
  for (int signal : {SIGTERM, SIGINT, SIGUSR1, SIGUSR2}) sigaddset(&signals, signal);
  if (!IsIgnored(SIGHUP)) sigaddset(&signals, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return signals;
}

}  // namespace

SignalWatcher::SignalWatcher()
    : signals_(BlockSignals()), thread_([this] { Watch(); }) {}

SignalWatcher::~SignalWatcher() {
  ending_.store(true);
  pthread_kill(thread_.native_handle(), kWake);
  thread_.join();
}

void SignalWatcher::Watch() {
  int signal = 0;
  bool signalled = false;  // RequestStop() and SIGHUP do not count
  while (sigwait(&signals_, &signal) == 0 && !ending_.load()) {
    const bool stops = signal == SIGTERM || signal == SIGINT;
    if (stops && signalled) _exit(128 + signal);
    signalled = signalled || stops;
    if (stops || signal == SIGHUP) RequestStop();
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
