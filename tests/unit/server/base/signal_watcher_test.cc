// Spec: server/base/signal_watcher.h. In death tests, so that the signals of one case
// never reach another.
#include "server/base/signal_watcher.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

namespace pbs::server {
namespace {

class SignalWatcherSpec : public testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

[[noreturn]] void ExitAfterOne(int signal) {
  SignalWatcher watcher;
  if (watcher.stop_requested()) std::_Exit(3);
  kill(getpid(), signal);
  watcher.WaitForStop();
  std::_Exit(watcher.stop_flag() ? 0 : 4);
}

TEST_F(SignalWatcherSpec, TheFirstSignalAsksToStop) {
  EXPECT_EXIT(ExitAfterOne(SIGTERM), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(ExitAfterOne(SIGINT), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(ExitAfterOne(SIGHUP), testing::ExitedWithCode(0), "");
}

[[noreturn]] void WaitForEverAfterTwo() {
  SignalWatcher watcher;
  kill(getpid(), SIGTERM);
  watcher.WaitForStop();
  kill(getpid(), SIGINT);
  while (true) pause();
}

TEST_F(SignalWatcherSpec, TheSecondSignalEndsTheProcessAtOnce) {
  EXPECT_EXIT(WaitForEverAfterTwo(), testing::ExitedWithCode(128 + SIGINT), "");
}

[[noreturn]] void ExitAfterOthers(int other) {
  SignalWatcher watcher;
  kill(getpid(), other);
  while (true) {
    sigset_t pending;
    sigpending(&pending);
    if (sigismember(&pending, other) == 0) break;
  }
  if (watcher.stop_requested()) std::_Exit(3);
  kill(getpid(), SIGTERM);
  watcher.WaitForStop();
  std::_Exit(0);
}

TEST_F(SignalWatcherSpec, OtherSignalsNeitherStopTheProcessNorTheWatch) {
  for (const int other : {SIGUSR1, SIGUSR2, SIGPIPE, SIGXFSZ}) {
    EXPECT_EXIT(ExitAfterOthers(other), testing::ExitedWithCode(0), "") << other;
  }
}

TEST_F(SignalWatcherSpec, HangingUpAsksToStopAndNeverEndsTheProcess) {
  EXPECT_EXIT(
      {
        SignalWatcher watcher;
        for (int i = 0; i < 3; ++i) {
          kill(getpid(), SIGHUP);
          watcher.WaitForStop();
        }
        std::_Exit(0);
      },
      testing::ExitedWithCode(0), "");
}

[[noreturn]] void HangUpUnderNohup() {
  std::signal(SIGHUP, SIG_IGN);
  SignalWatcher watcher;
  kill(getpid(), SIGHUP);
  const bool stopped = watcher.stop_requested();
  kill(getpid(), SIGTERM);
  watcher.WaitForStop();
  std::_Exit(stopped ? 3 : 0);
}

TEST_F(SignalWatcherSpec, HangingUpIsWithoutEffectWhereItWasIgnored) {
  EXPECT_EXIT(HangUpUnderNohup(), testing::ExitedWithCode(0), "");
}

[[noreturn]] void ExitWithoutSignal() {
  { SignalWatcher watcher; }
  std::_Exit(0);
}

TEST_F(SignalWatcherSpec, EndsWithoutASignal) {
  EXPECT_EXIT(ExitWithoutSignal(), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace pbs::server
