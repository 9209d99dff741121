// The log: one JSON object per line.
//
//   {"time":"2026-01-31T12:00:00.123456Z","level":"info","event":"serving","port":50051}
//
// `event` names what happened in snake_case; the fields are its facts. Prompts, token
// ids, tensor values and secrets are never logged.
//
// Threading: safe from any thread. A thread of its own writes the lines from a bounded
// queue. When the reader of stderr stalls, the queue drops its oldest lines and no
// request waits.
// Memory: at most kQueuedLinesMax lines.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iosfwd>
#include <memory>
#include <string>
#include <string_view>
#include <variant>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace pbs::server {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// "debug", "info", "warning", "error".
const char* LogLevelName(LogLevel level);

struct LogField {
  using Value = std::variant<std::string_view, int64_t, uint64_t, double, bool>;

  LogField(std::string_view field, std::string_view text) : name(field), value(text) {}
  LogField(std::string_view field, const char* text)
      : LogField(field, std::string_view(text)) {}
  LogField(std::string_view field, const std::string& text)
      : LogField(field, std::string_view(text)) {}
  LogField(std::string_view field, bool flag) : name(field), value(flag) {}
  LogField(std::string_view field, double number) : name(field), value(number) {}
  template <std::signed_integral T>
  LogField(std::string_view field, T number)
      : name(field), value(static_cast<int64_t>(number)) {}
  template <std::unsigned_integral T>
  LogField(std::string_view field, T number)
      : name(field), value(static_cast<uint64_t>(number)) {}

  std::string_view name;
  Value value;
};

// The line without its newline. Control characters and quotes are escaped, invalid
// UTF-8 becomes U+FFFD, a NaN or an infinity becomes null.
std::string FormatLogLine(absl::Time time, LogLevel level, std::string_view event,
                          std::initializer_list<LogField> fields);

class Log {
 public:
  static constexpr size_t kQueuedLinesMax = 4096;

  // Writes to stderr. A line below `level` costs one comparison.
  explicit Log(LogLevel level);
  // Writes to `stream`, which must outlive the log.
  Log(LogLevel level, std::ostream& stream);
  // Writes all queued lines.
  ~Log();

  void Debug(std::string_view event, std::initializer_list<LogField> fields = {}) {
    Write(LogLevel::kDebug, event, fields);
  }
  void Info(std::string_view event, std::initializer_list<LogField> fields = {}) {
    Write(LogLevel::kInfo, event, fields);
  }
  void Warning(std::string_view event, std::initializer_list<LogField> fields = {}) {
    Write(LogLevel::kWarning, event, fields);
  }
  void Error(std::string_view event, std::initializer_list<LogField> fields = {}) {
    Write(LogLevel::kError, event, fields);
  }
  void Write(LogLevel level, std::string_view event,
             std::initializer_list<LogField> fields);

 private:
  struct Writer;

  const LogLevel level_;
  std::unique_ptr<Writer> writer_;
};

}  // namespace pbs::server
