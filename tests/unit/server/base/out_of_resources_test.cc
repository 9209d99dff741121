// Spec: server/base/terminate_handler.h and thread_check.h. In death tests: each case
// has a process and limits of its own.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "server/base/terminate_handler.h"
#include "server/base/thread_check.h"

namespace pbs::server {
namespace {

// Leaves too little for the stack of a thread, and enough for the rest.
void TakeAddressSpaceAway() {
  int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  const auto bytes = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE) + (2 << 20));
  const rlimit few = {bytes, bytes};
  setrlimit(RLIMIT_AS, &few);
}

class OutOfResourcesSpec : public testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

// On a thread of its own: the test framework catches what is thrown on its own one.
template <class Throwing>
void EndBy(const Throwing& throwing) {
  InstallTerminateHandler();
  std::thread(throwing).join();
}

TEST_F(OutOfResourcesSpec, WithoutMemoryTheProcessSaysSoAndEndsWithOne) {
  EXPECT_EXIT(
      EndBy([] {
        void* volatile used = ::operator new(size_t{1} << 62);
        static_cast<void>(used);
      }),
      testing::ExitedWithCode(kExitOutOfResources),
      "\"event\":\"out_of_resources\",\"message\":\"the system refused memory; raise");
}

TEST_F(OutOfResourcesSpec, WithoutAThreadTheProcessSaysSoAndEndsWithOne) {
  EXPECT_EXIT(EndBy([] {
                TakeAddressSpaceAway();
                std::thread([] {}).join();
              }),
              testing::ExitedWithCode(kExitOutOfResources),
              "\"event\":\"out_of_resources\",\"message\":\"the system refused a "
              "thread; raise");
}

TEST_F(OutOfResourcesSpec, AnotherExceptionIsNamedAndAborts) {
  EXPECT_EXIT(EndBy([] { static_cast<void>(std::vector<int>().at(0)); }),
              testing::KilledBySignal(SIGABRT),
              "\"event\":\"uncaught_exception\".*_M_range");
}

TEST_F(OutOfResourcesSpec, ThreadsThatFitAreNoError) {
  EXPECT_TRUE(TryThreads(8).ok());
}

TEST_F(OutOfResourcesSpec, TheThreadThatDoesNotFitIsNamed) {
  EXPECT_EXIT(
      {
        TakeAddressSpaceAway();
        const absl::Status status = TryThreads(8);
        std::fputs(std::string(status.message()).c_str(), stderr);
        std::_Exit(absl::IsResourceExhausted(status) ? 0 : 3);
      },
      testing::ExitedWithCode(0), "the system refused thread 1 of 8 .*raise the limit");
}

}  // namespace
}  // namespace pbs::server
