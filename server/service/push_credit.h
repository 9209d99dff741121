// PushCredit: how much of a push the sink lets the server send, and how much it has
// confirmed.
//
// A payload is sent when all of it fits the credit of the latest acknowledgement. An
// acknowledgement that cannot be true ends the push: one of another transfer, one of
// bytes that were not sent, or one of fewer bytes than an earlier one. Credit may
// shrink; what was sent before stays sent.
//
// Threading: one thread at a time. Memory: fixed.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "pbs/v1/kv.pb.h"

namespace pbs::server {

class PushCredit {
 public:
  // `handle` is the transfer's; `bytes_total` those of all its payloads.
  PushCredit(std::string handle, uint64_t bytes_total);

  // Whether a payload of `bytes` may be sent now.
  bool Allows(uint64_t bytes) const { return bytes <= left(); }
  // Bytes that may be sent now.
  uint64_t left() const { return limit_ > sent_ ? limit_ - sent_ : 0; }
  // Counts a payload. Requires Allows(bytes).
  void Send(uint64_t bytes);

  // FailedPrecondition when the sink cannot mean it; nothing has changed then. The
  // message names field, value and limit.
  absl::Status Take(const v1::KvAck& ack);

  const std::string& handle() const { return handle_; }
  uint64_t total() const { return total_; }
  uint64_t sent() const { return sent_; }
  uint64_t received() const { return received_; }
  // The sink has confirmed every byte.
  bool complete() const { return received_ == total_; }

 private:
  const std::string handle_;
  const uint64_t total_;
  uint64_t sent_ = 0;
  uint64_t received_ = 0;
  uint64_t limit_ = 0;  // sent_ stays at or below it; never above total_
};

}  // namespace pbs::server
