// A pbs-prefilld in a process of its own, for tests between processes.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

extern char** environ;

namespace pbs::testing_support {

class ServerProcess {
 public:
  // Starts `binary` with `arguments` on free ports. `settings` (NAME=VALUE) override
  // this process's environment.
  ServerProcess(const std::string& binary, std::vector<std::string> arguments,
                std::vector<std::string> settings = {}) {
    arguments.insert(arguments.begin(), {binary, "--listen", "127.0.0.1:0"});
    int pipe_fds[2];
    EXPECT_EQ(pipe2(pipe_fds, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pipe_fds[1], STDERR_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    std::vector<char*> variables;
    for (std::string& setting : settings) variables.push_back(setting.data());
    for (char** variable = environ; *variable != nullptr; ++variable) {
      variables.push_back(*variable);
    }
    variables.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, binary.c_str(), &actions, nullptr, argv.data(),
                          variables.data()),
              0);
    posix_spawn_file_actions_destroy(&actions);
    close(pipe_fds[1]);
    reader_ = std::thread([this, fd = pipe_fds[0]] { ReadLog(fd); });
  }
  ~ServerProcess() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      Wait();
    }
  }
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal) const { EXPECT_EQ(kill(pid_, signal), 0); }

  // Stops the process until SIGCONT.
  void Freeze() const {
    Signal(SIGSTOP);
    siginfo_t info = {};
    EXPECT_EQ(waitid(P_PID, static_cast<id_t>(pid_), &info, WSTOPPED), 0);
  }

  // Waits for its end. Returns its exit status, or 1000 + the signal that ended it.
  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    reader_.join();
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }

  // Waits until it serves and returns its address. If it never serves, the test fails
  // and the result is "".
  std::string WaitForAddress() {
    const nlohmann::json serving = WaitForEvent("serving");
    EXPECT_TRUE(serving.is_object()) << "the server did not start";
    return serving.is_object() ? serving.value("listen", "") : "";
  }

  // Waits for the first log line of `event`; null when the process ends without one.
  nlohmann::json WaitForEvent(const std::string& event) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (size_t i = 0;; ++i) {
      changed_.wait(lock, [&] { return i < lines_.size() || ended_; });
      if (i >= lines_.size()) return nullptr;
      if (lines_[i].value("event", "") == event) return lines_[i];
    }
  }

 private:
  void ReadLog(int fd) {
    std::FILE* log = fdopen(fd, "r");
    std::string line;
    for (int c; (c = std::fgetc(log)) != EOF;) {
      if (c != '\n') {
        line += static_cast<char>(c);
        continue;
      }
      auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      line.clear();
      if (!json.is_object()) continue;  // a message that is not JSON
      const std::lock_guard<std::mutex> lock(mutex_);
      lines_.push_back(std::move(json));
      changed_.notify_all();
    }
    std::fclose(log);
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }

  pid_t pid_ = -1;
  std::thread reader_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<nlohmann::json> lines_;
  bool ended_ = false;
};

}  // namespace pbs::testing_support
