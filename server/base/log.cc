#include "server/base/log.h"

#include <spdlog/async_logger.h>
#include <spdlog/details/thread_pool.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "server/base/json_text.h"

namespace pbs::server {
namespace {

struct AppendValue {
  std::string& line;

  void operator()(std::string_view text) const { AppendJsonString(text, line); }
  void operator()(int64_t number) const { line += std::to_string(number); }
  void operator()(uint64_t number) const { line += std::to_string(number); }
  void operator()(bool flag) const { line += flag ? "true" : "false"; }
  void operator()(double number) const {
    if (std::isfinite(number)) {
      absl::StrAppendFormat(&line, "%.9g", number);
    } else {
      line += "null";
    }
  }
};

spdlog::level::level_enum SpdlogLevel(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      break;
  }
  return spdlog::level::err;
}

}  // namespace

const char* LogLevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarning:
      return "warning";
    case LogLevel::kError:
      return "error";
  }
  return "unknown";
}

std::string FormatLogLine(absl::Time time, LogLevel level, std::string_view event,
                          std::initializer_list<LogField> fields) {
  std::string line = "{\"time\":\"";
  line += absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ", time, absl::UTCTimeZone());
  line += "\",\"level\":\"";
  line += LogLevelName(level);
  line += "\",\"event\":";
  AppendJsonString(event, line);
  for (const LogField& field : fields) {
    line += ',';
    AppendJsonString(field.name, line);
    line += ':';
    std::visit(AppendValue{line}, field.value);
  }
  line += '}';
  return line;
}

struct Log::Writer {
  explicit Writer(spdlog::sink_ptr sink)
      : logger(nullptr),
        pool(std::make_shared<spdlog::details::thread_pool>(kQueuedLinesMax, 1)) {
    logger = std::make_shared<spdlog::async_logger>(
        "pbs", std::move(sink), pool, spdlog::async_overflow_policy::overrun_oldest);
    logger->set_pattern("%v");
    logger->set_level(spdlog::level::trace);
    logger->flush_on(spdlog::level::trace);
  }

  // shared_ptr: spdlog's queue entries share both. The pool dies first: its destructor
  // writes what is queued and joins the thread.
  std::shared_ptr<spdlog::async_logger> logger;
  std::shared_ptr<spdlog::details::thread_pool> pool;
};

Log::Log(LogLevel level)
    : level_(level),
      writer_(
          std::make_unique<Writer>(std::make_shared<spdlog::sinks::stderr_sink_mt>())) {
}

Log::Log(LogLevel level, std::ostream& stream)
    : level_(level),
      writer_(std::make_unique<Writer>(
          std::make_shared<spdlog::sinks::ostream_sink_mt>(stream))) {}

Log::~Log() = default;

void Log::Write(LogLevel level, std::string_view event,
                std::initializer_list<LogField> fields) {
  if (level < level_) return;
  const std::string line = FormatLogLine(absl::Now(), level, event, fields);
  writer_->logger->log(spdlog::source_loc{}, SpdlogLevel(level),
                       spdlog::string_view_t(line.data(), line.size()));
}

}  // namespace pbs::server
