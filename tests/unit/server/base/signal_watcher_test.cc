// Spec: server/base/signal_watcher.h. In death tests, so that the signals of one case
// never reach another.
#include "server/base/signal_watcher.h"

#include <gtest/gtest.h>
#include <unistd.h>

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

[[noreturn]] void ExitWithoutSignal() {
  { SignalWatcher watcher; }
  std::_Exit(0);
}

TEST_F(SignalWatcherSpec, EndsWithoutASignal) {
  EXPECT_EXIT(ExitWithoutSignal(), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace pbs::server
