#include "cuda/backend/staged_copies.h"

#include <algorithm>
#include <cstring>

namespace pbs::cuda {

StatusOr<std::unique_ptr<StagedCopies>> StagedCopies::Create(Driver& driver,
                                                             StreamId stream) {
  std::unique_ptr<StagedCopies> copies(new StagedCopies(driver, stream));
  for (Piece& piece : copies->pieces_) {
    PBS_ASSIGN_OR_RETURN(piece.data, driver.AllocateHost(kPieceBytes));
    PBS_ASSIGN_OR_RETURN(piece.copied, driver.CreateEvent());
  }
  return copies;
}

StagedCopies::~StagedCopies() {
  for (const Piece& piece : pieces_) {
    if (piece.data == nullptr) continue;
    // What is still on its way reads it. An error is in the driver's health.
    static_cast<void>(driver_.Synchronize(piece.copied));
    driver_.FreeHost(piece.data);
  }
}

Status StagedCopies::ToDevice(const void* source, void* target, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kPieceBytes) {
    const int64_t count = std::min(kPieceBytes, bytes - at);
    const Piece& piece = pieces_[next_];
    next_ = (next_ + 1) % kNumPieces;
    PBS_RETURN_IF_ERROR(driver_.Synchronize(piece.copied));
    std::memcpy(piece.data, static_cast<const std::byte*>(source) + at,
                static_cast<size_t>(count));
    PBS_RETURN_IF_ERROR(driver_.CopyToDevice(
        stream_, piece.data, static_cast<std::byte*>(target) + at, count));
    PBS_RETURN_IF_ERROR(driver_.Record(piece.copied, stream_));
  }
  return OkStatus();
}

Status StagedCopies::ToHost(const void* source, void* target, int64_t bytes) {
  const int64_t num_parts = (bytes + kPieceBytes - 1) / kPieceBytes;
  const auto count = [&](int64_t part) {
    return std::min(kPieceBytes, bytes - part * kPieceBytes);
  };
  // Part `begun` is enqueued while the host empties the one before it.
  for (int64_t begun = 0; begun <= num_parts; ++begun) {
    if (begun < num_parts) {
      const Piece& piece = pieces_[begun % kNumPieces];
      PBS_RETURN_IF_ERROR(driver_.Synchronize(piece.copied));
      PBS_RETURN_IF_ERROR(driver_.CopyToHost(
          stream_, static_cast<const std::byte*>(source) + begun * kPieceBytes,
          piece.data, count(begun)));
      PBS_RETURN_IF_ERROR(driver_.Record(piece.copied, stream_));
    }
    if (begun == 0) continue;
    const int64_t part = begun - 1;
    const Piece& piece = pieces_[part % kNumPieces];
    PBS_RETURN_IF_ERROR(driver_.Synchronize(piece.copied));
    std::memcpy(static_cast<std::byte*>(target) + part * kPieceBytes, piece.data,
                static_cast<size_t>(count(part)));
  }
  return OkStatus();
}

}  // namespace pbs::cuda
