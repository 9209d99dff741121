#include "server/engine/byte_ledger.h"
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "pbs/check.h"

namespace pbs::server {

ByteReservation& ByteReservation::operator=(ByteReservation&& other) noexcept {
  if (this != &other) {
    Reset();
    ledger_ = std::exchange(other.ledger_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void ByteReservation::ShrinkTo(int64_t bytes) {
  PBS_CHECK(0 <= bytes && bytes <= bytes_);
  if (ledger_ != nullptr) ledger_->GiveBack(bytes_ - bytes);
  bytes_ = bytes;
}

ByteReservation ByteReservation::Split(int64_t bytes) {
  PBS_CHECK(0 <= bytes && bytes <= bytes_);
  bytes_ -= bytes;
  return ByteReservation(ledger_, bytes);
}

void ByteReservation::Reset() {
  ShrinkTo(0);
  ledger_ = nullptr;
}

absl::StatusOr<ByteReservation> ByteLedger::Reserve(int64_t bytes) {
  PBS_CHECK(bytes >= 0);
  MutexLock lock(mutex_);
  if (bytes > bytes_max_) {
    return absl::InvalidArgumentError(
        absl::StrCat("the request needs ", bytes,
                     " bytes of memory, more than memory_bytes_max ", bytes_max_));
  }
  if (bytes > bytes_max_ - bytes_held_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the request needs ", bytes, " bytes of memory; ", bytes_max_ - bytes_held_,
        " of memory_bytes_max ", bytes_max_, " are free"));
  }
  bytes_held_ += bytes;
  return ByteReservation(this, bytes);
}

absl::Status ByteLedger::Withhold(int64_t bytes) {
  MutexLock lock(mutex_);
  PBS_CHECK(bytes >= 0 && bytes_held_ == 0);
  if (bytes > bytes_max_) {
    return absl::InvalidArgumentError(absl::StrCat(
        bytes, " bytes of memory are more than memory_bytes_max ", bytes_max_));
  }
  bytes_max_ -= bytes;
  return absl::OkStatus();
}

int64_t ByteLedger::bytes_max() const {
  MutexLock lock(mutex_);
  return bytes_max_;
}

int64_t ByteLedger::bytes_held() const {
  MutexLock lock(mutex_);
  return bytes_held_;
}

void ByteLedger::GiveBack(int64_t bytes) {
  MutexLock lock(mutex_);
  PBS_CHECK(bytes <= bytes_held_);
  bytes_held_ -= bytes;
}

}  // namespace pbs::server
