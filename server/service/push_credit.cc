#include "server/service/push_credit.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pbs/check.h"

namespace pbs::server {

PushCredit::PushCredit(std::string handle, uint64_t bytes_total)
    : handle_(std::move(handle)), total_(bytes_total) {}

void PushCredit::Send(uint64_t bytes) {
  PBS_CHECK(Allows(bytes));
  sent_ += bytes;
}

absl::Status PushCredit::Take(const v1::KvAck& ack) {
  if (ack.handle() != handle_) {
    return absl::FailedPreconditionError(
        "the handle of its acknowledgement is not the transfer_id of this push");
  }
  if (ack.bytes_received() > sent_) {
    return absl::FailedPreconditionError(
        absl::StrCat("it acknowledged bytes_received ", ack.bytes_received(),
                     ", but only ", sent_, " were sent"));
  }
  if (ack.bytes_received() < received_) {
    return absl::FailedPreconditionError(absl::StrCat(
        "it acknowledged bytes_received ", ack.bytes_received(), " after ", received_));
  }
  received_ = ack.bytes_received();
  // No sum can overflow: both terms are at most total_.
  limit_ = received_ + std::min(ack.credit_bytes(), total_ - received_);
  return absl::OkStatus();
}

}  // namespace pbs::server
