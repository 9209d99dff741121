// One line of progress, rewritten in place, on a stderr that is a terminal.
//
// Threading: safe from any thread.
#pragma once

#include <mutex>
#include <string>

namespace pbs::decode {

class Progress {
 public:
  // Shows nothing when `quiet` or when stderr is not a terminal.
  explicit Progress(bool quiet);
  ~Progress() { Clear(); }

  void Show(const std::string& line);
  // Removes the line. Call it before anything else is written to the terminal.
  void Clear();

 private:
  const bool shown_;
  std::mutex mutex_;
  bool has_line_ = false;
};

// A progress bar: "[######....] 6/10".
std::string Bar(int done, int total);

}  // namespace pbs::decode
