// The admission budget. Bytes are charged before they are allocated, and given back
// when their last owner is destroyed.
//
// Threading: safe from any thread. The ledger must outlive its reservations.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/base/mutex.h"

namespace pbs::server {

class ByteLedger;

// Bytes charged to a ledger; gives them back when destroyed. Move-only.
class ByteReservation {
 public:
  ByteReservation() = default;
  ByteReservation(ByteReservation&& other) noexcept { *this = std::move(other); }
  ByteReservation& operator=(ByteReservation&& other) noexcept;
  ~ByteReservation() { Reset(); }

  int64_t bytes() const { return bytes_; }
  // Gives back all but `bytes`; requires 0 <= bytes <= bytes().
  void ShrinkTo(int64_t bytes);
  // Moves `bytes` of this charge into a new reservation. Requires as ShrinkTo().
  ByteReservation Split(int64_t bytes);
  void Reset();

 private:
  friend class ByteLedger;
  ByteReservation(ByteLedger* ledger, int64_t bytes) : ledger_(ledger), bytes_(bytes) {}

  ByteLedger* ledger_ = nullptr;
  int64_t bytes_ = 0;
};

class ByteLedger {
 public:
  explicit ByteLedger(int64_t bytes_max) : bytes_max_(bytes_max) {}

  // InvalidArgument, which names bytes_max, when `bytes` exceed it; ResourceExhausted,
  // which names the free bytes, when they do not fit now.
  absl::StatusOr<ByteReservation> Reserve(int64_t bytes);

  // Removes bytes from the budget for good, which lowers bytes_max(). InvalidArgument
  // when the budget has fewer; it is then unchanged. Requires that nothing is reserved.
  absl::Status Withhold(int64_t bytes);

  int64_t bytes_max() const;
  int64_t bytes_held() const;

 private:
  friend class ByteReservation;
  void GiveBack(int64_t bytes);

  mutable Mutex mutex_;
  int64_t bytes_max_ ABSL_GUARDED_BY(mutex_);
  int64_t bytes_held_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace pbs::server
