#include "client/cpp/decode/progress.h"

#include <unistd.h>

#include <cstdio>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"

namespace pbs::decode {

Progress::Progress(bool quiet) : shown_(!quiet && isatty(STDERR_FILENO) != 0) {}

void Progress::Show(const std::string& line) {
  if (!shown_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::fprintf(stderr, "\r\033[K%s", line.c_str());
  std::fflush(stderr);
  has_line_ = true;
}

void Progress::Clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (has_line_) std::fputs("\r\033[K", stderr);
  has_line_ = false;
}

std::string Bar(int done, int total) {
  constexpr int kWidth = 24;
  const int filled = total > 0 ? kWidth * done / total : 0;
  return absl::StrCat("[", std::string(static_cast<size_t>(filled), '#'),
                      std::string(static_cast<size_t>(kWidth - filled), '.'), "] ",
                      done, "/", total);
}

}  // namespace pbs::decode
