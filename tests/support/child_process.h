// A child process that a test starts and kills.
#pragma once

#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>

#include <csignal>
#include <string>
#include <vector>

extern char** environ;

namespace pbs::testing_support {

class ChildProcess {
 public:
  // Runs `command` with the stdout and stderr of this process.
  explicit ChildProcess(std::vector<std::string> command) {
    std::vector<char*> argv;
    for (std::string& argument : command) argv.push_back(argument.data());
    argv.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, argv[0], nullptr, nullptr, argv.data(), environ), 0);
  }
  ~ChildProcess() { Kill(); }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  // As `kill -9`. The test fails when the process has ended before.
  void Kill() {
    if (pid_ <= 0) return;
    EXPECT_EQ(kill(pid_, SIGKILL), 0);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    EXPECT_TRUE(WIFSIGNALED(status)) << "it ended by itself: " << status;
  }

 private:
  pid_t pid_ = -1;
};

}  // namespace pbs::testing_support
