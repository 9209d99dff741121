// Keys and values of one sequence, for every layer.
//
// Layout: for each layer K, then V, each [num_kv_heads, capacity, head_dim] in `dtype`;
// tokens in prompt order, keys after rotation (and after yarn's attention factor),
// heads not repeated. That is what every decode tier expects, and no method changes it.
//
// Threading: one writer. A layer that its writer has announced is never written again
// below num_tokens, so others may read it.
// Memory: one allocation. Device: pointers are the backend's, but for CreateOnHost().
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

  // Of K or V of one layer; of the whole cache.
  int64_t plane_bytes() const;
  int64_t bytes() const { return 2 * plane_bytes() * num_layers; }
  bool operator==(const KvShape&) const = default;
};

class KvCache {
 public:
  // Backend memory. ResourceExhausted when it cannot be had; so all three.
  static StatusOr<KvCache> Create(const KvShape& shape, Backend& backend);
  // Ordinary memory, for readers: where it is not the backend's, no prefill runs on it.
  static StatusOr<KvCache> CreateOnHost(const KvShape& shape, Backend& backend);
  // Backend memory of `resident_layers` layers, for one prefill from position 0: layer
  // l is written where layer l - resident_layers was.
  static StatusOr<KvCache> CreateWindow(const KvShape& shape, int32_t resident_layers,
                                        Backend& backend);

  const KvShape& shape() const { return shape_; }
  int32_t resident_layers() const { return resident_layers_; }
  void* k(int32_t layer) const { return Plane(2 * (layer % resident_layers_)); }
  void* v(int32_t layer) const { return Plane(2 * (layer % resident_layers_) + 1); }
  // Of k(layer) and v(layer).
  RowLayout layout() const { return PackedLayout(shape_.capacity, shape_.head_dim); }
  int64_t head_stride() const { return int64_t{shape_.capacity} * shape_.head_dim; }

  // Tokens that all layers hold. Set by a finished prefill or decode step, or by
  // whoever filled the cache from outside; at most the capacity.
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
