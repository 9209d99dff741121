#include "cuda/backend/staging_ring.h"

#include <cstring>

namespace pbs::cuda {

StatusOr<std::unique_ptr<StagingRing>> StagingRing::Create(Driver& driver,
                                                           StreamId stream) {
  std::unique_ptr<StagingRing> ring(new StagingRing(driver, stream));
  for (Piece& piece : ring->pieces_) {
    PBS_ASSIGN_OR_RETURN(piece.data, driver.AllocateHost(kPieceBytes));
    PBS_ASSIGN_OR_RETURN(piece.copied, driver.CreateEvent());
  }
  return ring;
}

StagingRing::~StagingRing() {
  for (const Piece& piece : pieces_) {
    if (piece.data == nullptr) continue;
    // What is still on its way reads it. An error is in the driver's health.
    static_cast<void>(driver_.Synchronize(piece.copied));
    driver_.FreeHost(piece.data);
  }
}

Status StagingRing::Send(int64_t part, const void* source, void* target,
                         int64_t bytes) {
  const Piece& piece = At(part);
  PBS_RETURN_IF_ERROR(driver_.Synchronize(piece.copied));
  std::memcpy(piece.data, source, static_cast<size_t>(bytes));
  PBS_RETURN_IF_ERROR(driver_.CopyToDevice(stream_, piece.data, target, bytes));
  return driver_.Record(piece.copied, stream_);
}

Status StagingRing::Fetch(int64_t part, const void* source, int64_t bytes) {
  const Piece& piece = At(part);
  PBS_RETURN_IF_ERROR(driver_.Synchronize(piece.copied));
  PBS_RETURN_IF_ERROR(driver_.CopyToHost(stream_, source, piece.data, bytes));
  return driver_.Record(piece.copied, stream_);
}

}  // namespace pbs::cuda
