// Writes the chunks of a cache into the caller's memory and checks order, place, size,
// checksum and layer digest of each. Chunks of F8_E4M3 are widened on arrival.
//
// Threading: one thread. Memory: copies each payload once, into the target, or each
// place in shared memory, which targets may also use where it lies; F8_E4M3 needs a
// chunk more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>

#include "absl/status/status.h"
#include "pbs/v1/kv.pb.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/messages.h"

namespace pbs::client {

// A piece of a (layer, kind) array where it lies in shared memory.
struct KvView {
  int32_t layer = 0;
  v1::KvChunk::Kind kind = v1::KvChunk::K;
  int64_t offset = 0;  // within the array
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> region;  // keeps the bytes mapped
};

// Memory for the arrays of a cache.
class KvTarget {
 public:
  virtual ~KvTarget() = default;
  // Returns memory for one (layer, kind) array, `bytes` long: the requested tokens and
  // heads in the requested layout and the stored dtype. Returns an empty span to refuse
  // the array.
  virtual std::span<std::byte> Array(int32_t layer, v1::KvChunk::Kind kind,
                                     int64_t bytes) = 0;
  // A target that can use shared memory where it lies gets checked views instead of
  // Array(), in the order of the arrays. The bytes read zeros when the lease ends. So
  // what was made of them counts only if Client::Describe() finds the lease after that.
  // Without shared memory Array() is called as for any other target.
  virtual bool TakesViews() const { return false; }
  virtual void OnView(const KvView& /*view*/) {}
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
  v1::DType dtype = v1::F32;   // of the chunks
  v1::DType stored = v1::F32;  // of the target's arrays, when dtype is F8_E4M3
  v1::KvLayout layout = v1::HND;
  int32_t page_tokens = 1;  // of the request
  bool checksums = true;

  int64_t row_bytes() const;  // one token of one head, as sent
  int64_t array_bytes() const;
  int64_t stored_bytes() const;  // of an array of the target
};

// The shared memory of a cache, whose chunks then have no payload. The server takes it
// away when the lease ends; it then reads zeros.
struct KvRegion {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;  // keeps them mapped
  // OK while nothing was taken away. Called before OnLayer() when there are no
  // checksums, by which that would be noticed.
  std::function<absl::Status()> still_held;
};

class KvReceiver {
 public:
  // `region` is null where chunks have payloads; it must outlive the receiver.
  KvReceiver(const KvExpectation& expected, KvTarget& target,
             const KvRegion* region = nullptr)
      : expected_(expected),
        target_(target),
        region_(region),
        layer_(expected.layer_begin) {}

  // DataLoss unless `chunk` is the next chunk, complete and uncorrupted; the contents
  // of its array are then unspecified. ResourceExhausted when the target refuses the
  // array.
  absl::Status Add(const wire::KvChunk& chunk);

  bool complete() const {
    return layer_ == expected_.layer_begin + expected_.layer_count;
  }
  // Layers before this one are complete; a broken transfer resumes here, at place().
  int32_t layer() const { return layer_; }
  // Bytes of payloads in their places.
  int64_t bytes() const { return bytes_; }
  // The first row of layer() that is missing; nullopt when all of it is. Not after
  // complete().
  std::optional<v1::KvPlace> place() const;
  // A new stream follows, which begins at place(). A server that does not know
  // FetchRequest.resume begins with layer() instead: what was received of it is then
  // discarded.
  void Resume();
  // Discards the received part of layer().
  void Rewind();

 private:
  bool views() const { return region_ != nullptr && target_.TakesViews(); }
  absl::Status CheckPlace(const wire::KvChunk& chunk) const;
  absl::Status CheckRegion(const wire::KvChunk& chunk, int64_t bytes) const;
  absl::Status Store(const wire::KvChunk& chunk, int64_t bytes);
  absl::Status StoreFromRegion(const wire::KvChunk& chunk, int64_t bytes);
  absl::Status CompareSum(const wire::KvChunk& chunk, uint32_t crc);
  absl::Status EndArray(const wire::KvChunk& chunk);

  const KvExpectation expected_;
  KvTarget& target_;
  const KvRegion* const region_;
  int32_t layer_;
  v1::KvChunk::Kind kind_ = v1::KvChunk::K;
  int64_t offset_ = 0;  // within the array
  int64_t bytes_ = 0;   // of complete and running arrays
  std::span<std::byte> array_;
  wire::LayerDigest digest_;
  bool resumed_ = false;  // and nothing has come since
};

}  // namespace pbs::client
