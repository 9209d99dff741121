// Turns log lines of libraries into events of our log, `library_line` with library,
// message and place, so that stderr has JSON lines only.
//
// Threading: create it before other threads start and destroy it after they have ended.
// Memory: none.
#pragma once

#include "server/base/log.h"

namespace pbs::server {

class LibraryLog {
 public:
  // gRPC and protobuf write to `log`, which must outlive this. Only one LibraryLog may
  // exist, because both libraries take a plain function.
  explicit LibraryLog(Log& log);
  // The libraries write to stderr again.
  ~LibraryLog();
  LibraryLog(const LibraryLog&) = delete;
  LibraryLog& operator=(const LibraryLog&) = delete;
};

}  // namespace pbs::server
