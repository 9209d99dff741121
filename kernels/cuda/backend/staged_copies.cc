#include "cuda/backend/staged_copies.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace pbs::cuda {

StatusOr<std::unique_ptr<StagedCopies>> StagedCopies::Create(Driver& driver,
                                                             StreamId stream) {
  PBS_ASSIGN_OR_RETURN(auto ring, StagingRing::Create(driver, stream));
  return std::unique_ptr<StagedCopies>(new StagedCopies(std::move(ring)));
}

Status StagedCopies::ToDevice(const void* source, void* target, int64_t bytes) {
  constexpr int64_t kPiece = StagingRing::kPieceBytes;
  for (int64_t at = 0; at < bytes; at += kPiece) {
    PBS_RETURN_IF_ERROR(ring_->Send(
        num_parts_++, static_cast<const std::byte*>(source) + at,
        static_cast<std::byte*>(target) + at, std::min(kPiece, bytes - at)));
  }
  return OkStatus();
}

Status StagedCopies::ToHost(const void* source, void* target, int64_t bytes) {
  constexpr int64_t kPiece = StagingRing::kPieceBytes;
  const int64_t first = num_parts_;
  const int64_t num_parts = (bytes + kPiece - 1) / kPiece;
  num_parts_ += num_parts;
  const auto count = [&](int64_t i) { return std::min(kPiece, bytes - i * kPiece); };
  // Part `begun` is enqueued while the host empties the one before it.
  for (int64_t begun = 0; begun <= num_parts; ++begun) {
    if (begun < num_parts) {
      PBS_RETURN_IF_ERROR(ring_->Fetch(
          first + begun, static_cast<const std::byte*>(source) + begun * kPiece,
          count(begun)));
    }
    if (begun == 0) continue;
    const int64_t i = begun - 1;
    PBS_RETURN_IF_ERROR(ring_->Wait(first + i));
    std::memcpy(static_cast<std::byte*>(target) + i * kPiece, ring_->Arrived(first + i),
                static_cast<size_t>(count(i)));
  }
  return OkStatus();
}

}  // namespace pbs::cuda
