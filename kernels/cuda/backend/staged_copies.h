// Copies between any host memory and the device, for callers who wait.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "cuda/backend/driver.h"
#include "cuda/backend/staging_ring.h"

namespace pbs::cuda {

// Threading: one caller at a time. Memory: a staging ring.
class StagedCopies {
 public:
  static StatusOr<std::unique_ptr<StagedCopies>> Create(Driver& driver,
                                                        StreamId stream);

  // Copies after all work on the stream; the caller may reuse `source` on return.
  Status ToDevice(const void* source, void* target, int64_t bytes);
  // Copies to `target` and waits for it.
  Status ToHost(const void* source, void* target, int64_t bytes);

 private:
  explicit StagedCopies(std::unique_ptr<StagingRing> ring) : ring_(std::move(ring)) {}

  const std::unique_ptr<StagingRing> ring_;
  int64_t num_parts_ = 0;  // begun so far
};

}  // namespace pbs::cuda
