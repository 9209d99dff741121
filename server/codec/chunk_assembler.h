// Copies the chunks of an upload into their tensors.
//
// Chunks of different tensors may interleave in any way; chunks of one tensor must
// ascend without gaps. Every byte is copied once, from the received slice to its place.
//
// Threading: one thread at a time. Memory: borrows the targets; keeps nothing of a
// chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "pbs/v1/attention.pb.h"
#include "proto/wire/messages.h"

namespace pbs::server {

// "Q", "LIST_OFFSETS"; "TensorName 42" for a value outside the enum.
std::string TensorLabel(v1::TensorName tensor);

class ChunkAssembler {
 public:
  // Sets the memory of `tensor`. Call it once per tensor, before the first Add().
  void Expect(v1::TensorName tensor, std::span<std::byte> target);

  // Copies the chunk's bytes to their place. InvalidArgument names tensor, offset, the
  // expected offset and the tensor's size: for a tensor that was not announced, for
  // bytes that are missing, doubled or past the end, and for an empty chunk of a tensor
  // that is not empty. The targets are then unchanged.
  absl::Status Add(const wire::TensorChunk& chunk);

  // OK when every tensor is complete; InvalidArgument names the first one that is not.
  absl::Status Finish() const;

  // The received bytes of an expected `tensor`.
  std::span<const std::byte> Received(v1::TensorName tensor) const;

 private:
  struct Part {
    v1::TensorName tensor;
    std::span<std::byte> target;
    uint64_t received = 0;
  };
  const Part* Find(v1::TensorName tensor) const;

  std::vector<Part> parts_;
};

}  // namespace pbs::server
