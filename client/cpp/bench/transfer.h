// One kind of transfer that is measured: its streams run in parallel, a thread each.
//
// Use: per measurement Prepare(), then Run(i) for every stream at once, then Check().
// Threading: Run() from one thread per stream; the rest from one thread.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"

namespace pbs::bench {

struct TransferLabel {
  std::string direction;  // "upload", "download"
  std::string peer;       // "pbs", "tcp"
  int32_t streams = 1;
  bool checksums = false;  // CRC32C of every chunk, made and checked
};

class Transfer {
 public:
  explicit Transfer(TransferLabel label) : label_(std::move(label)) {}
  virtual ~Transfer() = default;

  const TransferLabel& label() const { return label_; }
  // Of all streams together.
  virtual int64_t bytes() const = 0;

  // Makes a transfer that moves nothing fail Check().
  virtual void Prepare() {}
  virtual absl::Status Run(int32_t stream) = 0;
  // DataLoss unless what the last runs moved is right.
  virtual absl::Status Check() { return absl::OkStatus(); }

 private:
  const TransferLabel label_;
};

}  // namespace pbs::bench
