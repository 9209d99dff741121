#include "server/service/library_log.h"

#include <google/protobuf/stubs/common.h>
#include <grpc/support/log.h>
#if GOOGLE_PROTOBUF_VERSION < 3022000
#include <google/protobuf/stubs/logging.h>
#endif

#include <atomic>
#include <cstdio>
#include <string>
#include <string_view>

#include "absl/time/clock.h"
#include "pbs/check.h"

namespace pbs::server {
namespace {

// The libraries' functions take no argument of ours.
std::atomic<Log*> target = nullptr;

void Write(LogLevel level, const char* library, const char* file, int line,
           const std::string& message) {
  Log* const log = target.load();
  if (log == nullptr) return;
  const std::string_view path = file;
  const std::string_view name = path.substr(path.rfind('/') + 1);
  log->Write(
      level, "library_line",
      {{"library", library}, {"message", message}, {"file", name}, {"line", line}});
}

// An error of a library is logged as a warning: the call that it ends has its own line.
LogLevel LevelOf(gpr_log_severity severity) {
  switch (severity) {
    case GPR_LOG_SEVERITY_DEBUG:
      return LogLevel::kDebug;
    case GPR_LOG_SEVERITY_INFO:
      return LogLevel::kInfo;
    case GPR_LOG_SEVERITY_ERROR:
      break;
  }
  return LogLevel::kWarning;
}

void TakeGrpcLine(gpr_log_func_args* args) {
  // gRPC aborts behind this one, and our log writes later.
  if (std::string_view(args->message).starts_with("assertion failed")) {
    const std::string line =
        FormatLogLine(absl::Now(), LogLevel::kError, "library_line",
                      {{"library", "grpc"}, {"message", args->message}}) +
        "\n";
    std::fputs(line.c_str(), stderr);
    return;
  }
  Write(LevelOf(args->severity), "grpc", args->file, args->line, args->message);
}

#if GOOGLE_PROTOBUF_VERSION < 3022000
namespace protobuf = google::protobuf;

void TakeProtobufLine(protobuf::LogLevel level, const char* file, int line,
                      const std::string& message) {
  const LogLevel ours =
      level == protobuf::LOGLEVEL_INFO ? LogLevel::kInfo : LogLevel::kWarning;
  Write(ours, "protobuf", file, line, message);
}

protobuf::LogHandler* stderr_handler = nullptr;

void RedirectProtobuf() { stderr_handler = protobuf::SetLogHandler(TakeProtobufLine); }
void RestoreProtobuf() { protobuf::SetLogHandler(stderr_handler); }
#else
void RedirectProtobuf() {}
void RestoreProtobuf() {}
#endif

}  // namespace

LibraryLog::LibraryLog(Log& log) {
  PBS_CHECK(target.exchange(&log) == nullptr);
  gpr_set_log_function(TakeGrpcLine);
  RedirectProtobuf();
}

LibraryLog::~LibraryLog() {
  RestoreProtobuf();
  gpr_set_log_function(nullptr);
  target = nullptr;
}

}  // namespace pbs::server
