// Headers of Attend calls for tests: one f32 sequence.
#pragma once

#include <array>
#include <cstdint>

#include "pbs/v1/attention.pb.h"

namespace pbs::testing_support {

// An upload whose q, k and v have the same shape, [1, heads, tokens, head_dim].
inline v1::AttendHeader UploadHeader(const std::array<int64_t, 4>& shape) {
  v1::AttendHeader header;
  for (v1::TensorName tensor : {v1::Q, v1::K, v1::V}) {
    v1::TensorSpec& spec = *header.add_tensors();
    spec.set_tensor(tensor);
    spec.set_dtype(v1::F32);
    for (int64_t axis : shape) spec.add_shape(axis);
  }
  return header;
}

// A header for tensors that the server generates.
inline v1::AttendHeader SyntheticHeader(int32_t heads, int32_t kv_heads, int32_t tokens,
                                        int32_t head_dim) {
  v1::AttendHeader header;
  v1::SyntheticSpec& spec = *header.mutable_synthetic();
  spec.set_batch(1);
  spec.set_num_heads(heads);
  spec.set_num_kv_heads(kv_heads);
  spec.set_seq_len(tokens);
  spec.set_head_dim(head_dim);
  spec.set_dtype(v1::F32);
  return header;
}

}  // namespace pbs::testing_support
