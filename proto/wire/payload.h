// The payload of a chunk: bytes that stay in the slices that gRPC sends or has
// received.
//
// Threading: values, as safe as the slices they hold references to.
// Memory:    a slice lives as long as anything refers to it; nothing here copies bytes
//            but CopyTo() and CopyInto().
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <grpcpp/support/slice.h>

#include "proto/wire/crc32c.h"
#include "proto/wire/stream_copy.h"

namespace pbs::wire {

class Payload {
 public:
  Payload() = default;
  explicit Payload(grpc::Slice piece) { Append(std::move(piece)); }

  void Append(grpc::Slice piece) {
    size_ += piece.size();
    pieces_.push_back(std::move(piece));
  }
  void Clear() {
    pieces_.clear();
    size_ = 0;
  }

  size_t size() const { return size_; }
  const std::vector<grpc::Slice>& pieces() const { return pieces_; }

  // Writes size() bytes.
  void CopyTo(std::byte* target) const {
    for (const grpc::Slice& piece : pieces_) {
      std::memcpy(target, piece.begin(), piece.size());
      target += piece.size();
    }
  }
  // As CopyTo(), into a part of a tensor of `tensor_bytes` bytes that is used only when
  // it is complete.
  void CopyInto(std::byte* target, size_t tensor_bytes) const {
    if (tensor_bytes < kStreamedBytesMin) return CopyTo(target);
    for (const grpc::Slice& piece : pieces_) {
      StreamCopy(target, reinterpret_cast<const std::byte*>(piece.begin()),
                 piece.size());
      target += piece.size();
    }
  }
  // As CopyInto(); returns the CRC-32C `crc`, extended by the payload.
  uint32_t CopyInto(std::byte* target, size_t tensor_bytes, uint32_t crc) const {
    const bool streamed = tensor_bytes >= kStreamedBytesMin;
    for (const grpc::Slice& piece : pieces_) {
      const auto* bytes = reinterpret_cast<const std::byte*>(piece.begin());
      crc = CopyCrc32c(crc, target, {bytes, piece.size()}, streamed);
      target += piece.size();
    }
    return crc;
  }

 private:
  std::vector<grpc::Slice> pieces_;
  size_t size_ = 0;
};

// A slice of memory that `owner` keeps alive. The slice drops `owner` with its last
// reference.
template <class Owner>
grpc::Slice SliceOf(const void* data, size_t size, std::shared_ptr<Owner> owner) {
  return grpc::Slice(
      const_cast<void*>(data), size,
      [](void* held) { delete static_cast<std::shared_ptr<Owner>*>(held); },
      new std::shared_ptr<Owner>(std::move(owner)));
}

inline std::span<const std::byte> BytesOf(const grpc::Slice& slice) {
  return {reinterpret_cast<const std::byte*>(slice.begin()), slice.size()};
}

}  // namespace pbs::wire
