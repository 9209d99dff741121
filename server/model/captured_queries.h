// The queries of chosen layers of one prefill, after rotation, for readers.
//
// Layout: for each captured layer [num_tokens, num_heads, head_dim], dense, in the
// dtype of the KV cache. The logit of a query and a key of the cache is their dot
// product divided by sqrt(head_dim).
//
// Threading: as KvCache. Memory: one allocation of ordinary memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "pbs/backend.h"
#include "pbs/dtype.h"
#include "pbs/status.h"

namespace pbs {

struct QueryShape {
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  int32_t num_tokens = 0;
  DType dtype = DType::kF32;

  int64_t layer_bytes() const {
    return int64_t{num_heads} * head_dim * num_tokens * DTypeBytes(dtype);
  }
  bool operator==(const QueryShape&) const = default;
};

class CapturedQueries {
 public:
  // Captures nothing.
  CapturedQueries() = default;
  // `layers` ascend without repeats. ResourceExhausted when there is not enough memory.
  static StatusOr<CapturedQueries> Create(const QueryShape& shape,
                                          std::vector<int32_t> layers,
                                          Backend& backend);

  static int64_t BytesOf(const QueryShape& shape, size_t num_layers) {
    return shape.layer_bytes() * static_cast<int64_t>(num_layers);
  }

  const QueryShape& shape() const { return shape_; }
  std::span<const int32_t> layers() const { return layers_; }
  int64_t bytes() const { return BytesOf(shape_, layers_.size()); }
  // The first captured layer that is at least `layer`; `end` if there is none below it.
  int32_t NextLayer(int32_t layer, int32_t end) const;
  // Null for a layer that is not captured.
  void* data(int32_t layer) const;

 private:
  CapturedQueries(const QueryShape& shape, std::vector<int32_t> layers, Buffer buffer)
      : shape_(shape), layers_(std::move(layers)), buffer_(std::move(buffer)) {}

  QueryShape shape_;
  std::vector<int32_t> layers_;
  Buffer buffer_;
};

}  // namespace pbs
