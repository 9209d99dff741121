// Writes the chunks of a cache into the caller's memory and checks order, place, size,
// checksum and layer digest of each.
//
// Threading: one thread. Memory: copies each payload once, into the target.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "absl/status/status.h"
#include "pbs/v1/kv.pb.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/messages.h"

namespace pbs::client {

// Memory for the arrays of a cache.
class KvTarget {
 public:
  virtual ~KvTarget() = default;
  // Returns memory for one (layer, kind) array, `bytes` long: the requested tokens and
  // heads in the requested layout. Returns an empty span to refuse the array.
  virtual std::span<std::byte> Array(int32_t layer, v1::KvChunk::Kind kind,
                                     int64_t bytes) = 0;
  // Called when the layer's keys and values are complete and checked.
  virtual void OnLayer(int32_t /*layer*/) {}
};

// The expected transfer.
struct KvExpectation {
  std::optional<uint64_t> epoch;  // the ticket's
  int32_t layer_begin = 0, layer_count = 0;
  int32_t token_begin = 0, token_count = 0;
  int32_t head_begin = 0, head_count = 0;
  int32_t head_dim = 0;
  v1::DType dtype = v1::F32;
  v1::KvLayout layout = v1::HND;
  bool checksums = true;

  int64_t row_bytes() const;  // one token of one head
  int64_t array_bytes() const;
};

class KvReceiver {
 public:
  KvReceiver(const KvExpectation& expected, KvTarget& target)
      : expected_(expected), target_(target), layer_(expected.layer_begin) {}

  // DataLoss unless `chunk` is the next chunk, complete and uncorrupted; the contents
  // of its array are then unspecified. ResourceExhausted when the target refuses the
  // array.
  absl::Status Add(const wire::KvChunk& chunk);

  bool complete() const {
    return layer_ == expected_.layer_begin + expected_.layer_count;
  }
  // Layers before this one are complete; a broken transfer resumes here.
  int32_t layer() const { return layer_; }
  int64_t bytes() const { return bytes_; }
  // Discards the received part of layer().
  void Rewind();

 private:
  absl::Status CheckPlace(const wire::KvChunk& chunk) const;
  absl::Status CheckSum(const wire::KvChunk& chunk);
  absl::Status EndArray(const wire::KvChunk& chunk);

  const KvExpectation expected_;
  KvTarget& target_;
  int32_t layer_;
  v1::KvChunk::Kind kind_ = v1::KvChunk::K;
  int64_t offset_ = 0;  // within the array
  int64_t bytes_ = 0;   // of complete and running arrays
  std::span<std::byte> array_;
  wire::LayerDigest digest_;
};

}  // namespace pbs::client
