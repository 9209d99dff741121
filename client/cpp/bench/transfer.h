// One kind of measured transfer. Its streams run in parallel, one thread each.
//
// Use: for each measurement call Prepare(), then Run(i) for all streams at once, then
// Check().
// Threading: Run() from one thread per stream; the rest from one thread.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"

namespace pbs::bench {

struct TransferLabel {
  std::string direction;  // "upload", "download"
  std::string peer;       // "pbs", "tcp", "protobuf", "flight"
  int32_t streams = 1;
  bool checksums = false;  // CRC32C of every chunk, made and checked
};

class Transfer {
 public:
  explicit Transfer(TransferLabel label) : label_(std::move(label)) {}
  virtual ~Transfer() = default;

  const TransferLabel& label() const { return label_; }
  // Payload bytes of all streams together.
  virtual int64_t bytes() const = 0;
  // The process that receives or sends for us; 0: this one.
  virtual pid_t client_pid() const { return 0; }

  // Overwrites the targets, so that Check() fails for a transfer that moves nothing.
  virtual void Prepare() {}
  virtual absl::Status Run(int32_t stream) = 0;
  // DataLoss unless the last runs moved the right bytes.
  virtual absl::Status Check() { return absl::OkStatus(); }

 private:
  const TransferLabel label_;
};

}  // namespace pbs::bench
