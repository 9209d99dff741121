// The upload of an Attend, from its header to a job for the engine.
//
// Threading: one thread at a time. When takes_time() is true (generator, checks of
// orders and lists) MakeJob() may take seconds: call it on the background thread.
// Memory: all of it is charged before it is allocated, and allocated before the first
// chunk. Destroying the upload frees it.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/wire/messages.h"
#include "server/base/block_cache.h"
#include "server/codec/attend_request.h"
#include "server/codec/chunk_assembler.h"
#include "server/engine/engine.h"

namespace pbs::server {

class AttendUpload {
 public:
  // `reservation` is the engine's for `spec`. Memory of tensors comes from `blocks` and
  // returns to it. ResourceExhausted when the system refuses the memory.
  static absl::StatusOr<std::unique_ptr<AttendUpload>> Create(
      AttendSpec spec, AttendReservation reservation,
      const std::shared_ptr<BlockCache>& blocks);

  // Copies a chunk to its place and checks the new elements. Errors as
  // ChunkAssembler::Add(); InvalidArgument names the tensor and index of a NaN or
  // infinity.
  absl::Status Add(const wire::TensorChunk& chunk);

  // Call it after the last chunk. InvalidArgument when a tensor is incomplete.
  absl::Status Finish() const { return assembler_.Finish(); }

  bool takes_time() const {
    const AttentionOptions& options = spec_.problem.options;
    return spec_.generator.has_value() || options.use_given_order ||
           options.use_given_lists;
  }

  // Runs the generator, checks order and lists, and moves everything into a job.
  // InvalidArgument as ValidateOrder() and ValidateLists(); Cancelled when `stop` turns
  // true.
  absl::StatusOr<AttendJob> MakeJob(JobTerms terms, const std::atomic<bool>& stop);

 private:
  // One block of memory per input tensor. Blocks of tensors that the problem lacks are
  // empty.
  struct Input {
    v1::TensorName tensor;
    HostBytes bytes;
    int64_t scanned = 0;  // elements known to be finite
  };

  AttendUpload(AttendSpec spec, AttendReservation reservation)
      : spec_(std::move(spec)), reservation_(std::move(reservation)) {}

  absl::Status Allocate(const std::shared_ptr<BlockCache>& blocks);
  absl::Status Generate(const std::atomic<bool>& stop);
  absl::Status ScanNewElements(Input& input);
  Input& Find(v1::TensorName tensor);

  AttendSpec spec_;
  AttendReservation reservation_;
  std::array<Input, 6> inputs_ = {{{v1::Q, {}},
                                   {v1::K, {}},
                                   {v1::V, {}},
                                   {v1::ORDER, {}},
                                   {v1::LIST_OFFSETS, {}},
                                   {v1::LIST_INDICES, {}}}};
  ChunkAssembler assembler_;
};

}  // namespace pbs::server
