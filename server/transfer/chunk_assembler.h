// Puts the chunks of an upload into the tensors they belong to.
//
// Chunks of different tensors may interleave in any way; those of one tensor must
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

// "Q", "LIST_OFFSETS"; "TensorName 42" for what is no tensor.
std::string TensorLabel(v1::TensorName tensor);

class ChunkAssembler {
 public:
  // `tensor` will fill `target`. Once per tensor, before the first Add().
  void Expect(v1::TensorName tensor, std::span<std::byte> target);

  // Copies the chunk's bytes to their place. InvalidArgument, with tensor, offset, what
  // was expected and the tensor's size, for a tensor that was not announced, for bytes
  // that are missing, doubled or past the end, and for an empty chunk of a tensor that
  // is not empty; the targets are then as before.
  absl::Status Add(const wire::TensorChunk& chunk);

  // OK when every tensor is whole; InvalidArgument names the first that is not.
  absl::Status Finish() const;

  // The bytes of an expected `tensor` that are there.
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
