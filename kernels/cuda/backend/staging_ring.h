// Pinned memory of the driver, through which copies between any host memory and the
// device go part by part.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "cuda/backend/driver.h"

namespace pbs::cuda {

// It has two pieces: the host fills or empties one while the other is copied.
//
// Parts are numbered: part n goes through piece n % kNumPieces. Those of one piece are
// begun in rising order, each after the one before it was emptied.
//
// Threading: one caller at a time. Memory: kNumPieces x kPieceBytes of host memory.
class StagingRing {
 public:
  static constexpr int kNumPieces = 2;
  static constexpr int64_t kPieceBytes = int64_t{4} << 20;  // the most bytes of a part

  static StatusOr<std::unique_ptr<StagingRing>> Create(Driver& driver, StreamId stream);
  // Waits for copies under way.
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  // Send() and Fetch() wait for the piece and enqueue on the stream. Send() copies to
  // the device; the caller may reuse `source` on return.
  Status Send(int64_t part, const void* source, void* target, int64_t bytes);
  // Copies to the host; Arrived() gives the part there.
  Status Fetch(int64_t part, const void* source, int64_t bytes);

  // Waits for the part that was begun last in its piece.
  Status Wait(int64_t part) { return driver_.Synchronize(At(part).copied); }
  const void* Arrived(int64_t part) const { return At(part).data; }

 private:
  struct Piece {
    void* data = nullptr;
    EventId copied = 0;
  };

  StagingRing(Driver& driver, StreamId stream) : driver_(driver), stream_(stream) {}
  const Piece& At(int64_t part) const {
    return pieces_[static_cast<size_t>(part % kNumPieces)];
  }

  Driver& driver_;
  const StreamId stream_;
  std::array<Piece, kNumPieces> pieces_;
};

}  // namespace pbs::cuda
