#include "client/cpp/bench/child_process.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace pbs::bench {
namespace {

absl::Status SystemError(const std::string& what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(errno)));
}

// Replaces the process. Only calls that are allowed after a fork.
[[noreturn]] void Execute(const std::vector<char*>& arguments, int input, int output) {
  if (dup2(input, STDIN_FILENO) >= 0 && dup2(output, STDOUT_FILENO) >= 0) {
    execvp(arguments.front(), arguments.data());
  }
  _exit(127);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Fork(
    const std::function<void()>& body) {
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return SystemError("fork");
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() == parent) body();  // else it was gone before we asked
    _exit(0);
  }
  return std::unique_ptr<ChildProcess>(new ChildProcess(pid));
}

ChildProcess::~ChildProcess() {
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

absl::StatusOr<std::unique_ptr<LineProcess>> LineProcess::Start(
    const std::vector<std::string>& command) {
  std::array<int, 2> to{}, from{};
  if (pipe2(to.data(), O_CLOEXEC) != 0) return SystemError("pipe");
  if (pipe2(from.data(), O_CLOEXEC) != 0) {
    const absl::Status failure = SystemError("pipe");
    for (const int end : to) close(end);
    return failure;
  }
  std::vector<char*> arguments;
  for (const std::string& argument : command) {
    arguments.push_back(const_cast<char*>(argument.c_str()));
  }
  arguments.push_back(nullptr);
  auto child = ChildProcess::Fork([&] { Execute(arguments, to[0], from[1]); });
  close(to[0]);
  close(from[1]);
  if (!child.ok()) {
    close(to[1]);
    close(from[0]);
    return child.status();
  }
  return std::unique_ptr<LineProcess>(
      new LineProcess(*std::move(child), command.front(), to[1], from[0]));
}

LineProcess::~LineProcess() {
  close(input_);
  close(output_);
}

absl::StatusOr<std::string> LineProcess::ReadLine() {
  while (true) {
    if (const size_t end = unread_.find('\n'); end != std::string::npos) {
      std::string line = unread_.substr(0, end);
      unread_.erase(0, end + 1);
      return line;
    }
    std::array<char, 512> part;
    const ssize_t size = read(output_, part.data(), part.size());
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return SystemError(name_);
    if (size == 0) {
      return absl::UnavailableError(absl::StrCat(name_, " ended; see its messages"));
    }
    unread_.append(part.data(), static_cast<size_t>(size));
  }
}

absl::StatusOr<std::string> LineProcess::Ask(const std::string& line) {
  const std::string text = line + "\n";
  // A line is shorter than a pipe's buffer and is written whole.
  if (write(input_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    return SystemError(name_);
  }
  return ReadLine();
}

}  // namespace pbs::bench
