// Keys and values of one sequence, for every layer.
//
// Layout: for each layer K, then V, each [num_kv_heads, capacity, head_dim] in `dtype`;
// tokens in prompt order, keys after rotation (and after yarn's attention factor),
// heads not repeated. Every decode tier expects this layout, and no method changes it.
//
// Threading: one writer. After the writer has announced a layer it does not write it
// again below num_tokens, so other threads may read it.
// Memory: one allocation. Device: pointers are device pointers, except after
// CreateOnHost() and CreateIn().
#pragma once

#include <cstdint>
#include <utility>

#include "pbs/attention.h"
#include "pbs/backend.h"
#include "pbs/status.h"

namespace pbs {

struct KvShape {
  int32_t num_layers = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t capacity = 0;  // tokens, 1 .. kSeqLenMax
  DType dtype = DType::kF32;

  // Bytes of K or of V of one layer, and bytes of the whole cache.
  int64_t plane_bytes() const;
  int64_t bytes() const { return 2 * plane_bytes() * num_layers; }
  bool operator==(const KvShape&) const = default;
};

class KvCache {
 public:
  // Allocates backend memory. ResourceExhausted when there is not enough, as in the
  // other two.
  static StatusOr<KvCache> Create(const KvShape& shape, Backend& backend);
  // Allocates ordinary memory, for readers. Where that is not the backend's memory, no
  // prefill can run on it.
  static StatusOr<KvCache> CreateOnHost(const KvShape& shape, Backend& backend);
  // Takes zeroed memory of shape.bytes(), for readers. InvalidArgument as Create().
  static StatusOr<KvCache> CreateIn(const KvShape& shape, Buffer memory);
  // Allocates backend memory of `resident_layers` layers, for one prefill from position
  // 0. Layer l overwrites layer l - resident_layers.
  static StatusOr<KvCache> CreateWindow(const KvShape& shape, int32_t resident_layers,
                                        Backend& backend);

  const KvShape& shape() const { return shape_; }
  int32_t resident_layers() const { return resident_layers_; }
  void* k(int32_t layer) const { return Plane(2 * (layer % resident_layers_)); }
  void* v(int32_t layer) const { return Plane(2 * (layer % resident_layers_) + 1); }
  // Layout of k(layer) and v(layer).
  RowLayout layout() const { return PackedLayout(shape_.capacity, shape_.head_dim); }
  int64_t head_stride() const { return int64_t{shape_.capacity} * shape_.head_dim; }

  // Tokens that all layers hold, at most the capacity. A finished prefill or decode
  // step sets it, or the code that fills the cache with fetched layers.
  int32_t num_tokens() const { return num_tokens_; }
  void set_num_tokens(int32_t num_tokens);

 private:
  KvCache(const KvShape& shape, int32_t resident_layers, Buffer buffer)
      : shape_(shape), resident_layers_(resident_layers), buffer_(std::move(buffer)) {}
  void* Plane(int64_t index) const;

  KvShape shape_;
  int32_t resident_layers_ = 0;
  Buffer buffer_;
  int32_t num_tokens_ = 0;
};

}  // namespace pbs
