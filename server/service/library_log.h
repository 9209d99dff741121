// Lines that libraries write about themselves become events of our log: `library_line`
// with library, message and place. Otherwise they would stand on stderr between the
// JSON lines.
//
// Threading: create before other threads start and destroy when they have ended.
// Memory: none.
#pragma once

#include "server/base/log.h"

namespace pbs::server {

class LibraryLog {
 public:
  // gRPC and protobuf write to `log`, which must outlive this. One at a time: both
  // libraries take a plain function.
  explicit LibraryLog(Log& log);
  // Their lines go to stderr again.
  ~LibraryLog();
  LibraryLog(const LibraryLog&) = delete;
  LibraryLog& operator=(const LibraryLog&) = delete;
};

}  // namespace pbs::server
