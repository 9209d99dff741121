// A process that a benchmark talks to and that ends with it.
//
// Threading: start children before this process has threads. Memory: one process.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace pbs::bench {

class ChildProcess {
 public:
  // Forks a copy of this process that runs `body`, which does not return. Unavailable
  // when the system refuses.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Fork(
      const std::function<void()>& body);
  // Kills the process and waits for its end.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  pid_t pid() const { return pid_; }

 private:
  explicit ChildProcess(pid_t pid) : pid_(pid) {}

  const pid_t pid_;
};

// A program that answers each line on its standard input with one line on its standard
// output. Its standard error is ours.
class LineProcess {
 public:
  // `command` is looked up in PATH. Unavailable when it cannot be started.
  static absl::StatusOr<std::unique_ptr<LineProcess>> Start(
      const std::vector<std::string>& command);
  ~LineProcess();
  LineProcess(const LineProcess&) = delete;
  LineProcess& operator=(const LineProcess&) = delete;

  pid_t pid() const { return child_->pid(); }
  // The next line of the program, without its end. Unavailable when it has ended.
  absl::StatusOr<std::string> ReadLine();
  // Sends `line` and returns the answer.
  absl::StatusOr<std::string> Ask(const std::string& line);

 private:
  LineProcess(std::unique_ptr<ChildProcess> child, std::string name, int input,
              int output)
      : child_(std::move(child)),
        name_(std::move(name)),
        input_(input),
        output_(output) {}

  const std::unique_ptr<ChildProcess> child_;
  const std::string name_;
  const int input_, output_;  // our ends of its pipes
  std::string unread_;
};

}  // namespace pbs::bench
