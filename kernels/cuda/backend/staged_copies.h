// Copies between any host memory and the device, through pieces of the driver's own.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "cuda/backend/driver.h"

namespace pbs::cuda {

// Two pieces: one is filled or emptied by the host while the other is on its way.
//
// Threading: one caller at a time. Memory: kNumPieces x kPieceBytes of host memory.
class StagedCopies {
 public:
  static constexpr int kNumPieces = 2;
  static constexpr int64_t kPieceBytes = int64_t{4} << 20;

  static StatusOr<std::unique_ptr<StagedCopies>> Create(Driver& driver,
                                                        StreamId stream);
  ~StagedCopies();
  StagedCopies(const StagedCopies&) = delete;
  StagedCopies& operator=(const StagedCopies&) = delete;

  // Behind everything on the stream; `source` may be reused on return.
  Status ToDevice(const void* source, void* target, int64_t bytes);
  // Waits until `target` is there.
  Status ToHost(const void* source, void* target, int64_t bytes);

 private:
  struct Piece {
    void* data = nullptr;
    EventId copied = 0;
  };

  StagedCopies(Driver& driver, StreamId stream) : driver_(driver), stream_(stream) {}

  Driver& driver_;
  const StreamId stream_;
  std::array<Piece, kNumPieces> pieces_;
  int next_ = 0;
};

}  // namespace pbs::cuda
