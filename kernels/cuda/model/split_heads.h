// Splits the fused projection's output: normalises heads (in models that do), rotates
// them, writes queries to their matrix and keys and values to the cache.
#pragma once

#include <cstdint>

#include "cuda/model/quads.h"

namespace pbs::cuda {

struct SplitHeadsParams {
  const void* qkv;  // [rows, num_heads + 2 num_kv_heads, head_dim]
  void* q;          // [rows, num_heads, head_dim]
  void* k;          // row r of head h at h * kv_head_stride + r * head_dim
  void* v;
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  const float* cosines;  // [rows, head_dim / 2]
  const float* sines;
  int64_t kv_head_stride;  // elements
  float epsilon;
  int32_t rows;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;  // a multiple of 8, at most 256
  DType qkv_dtype;
  DType kv_dtype;
};

// Lanes per head: a power of two, so that a shuffle stays inside a head.
PBS_HOST_DEVICE constexpr int LanesOfHead(int head_dim) {
  int lanes = 1;
  while (lanes * 2 * kQuad < head_dim) lanes *= 2;
  return lanes;
}

// One head of one row, held by a group of lanes. Each lane has a quad of either half,
// so that both elements of a rotated pair are in the same thread.
class HeadOfRow {
 public:
  struct Quads {
    Quad low, high;
  };

  // Row and head may be out of range; nothing is then read or stored.
  PBS_DEVICE HeadOfRow(const SplitHeadsParams& params, int32_t row, int32_t head,
                       int lane)
      : params_(params),
        row_(row),
        head_(head),
        lane_(lane),
        half_(params.head_dim / 2 / kQuad),
        inside_(row >= 0 && row < params.rows && head < NumHeads() && lane < half_) {}

  // Loads the quads; zeros when out of range.
  PBS_DEVICE Quads Load() const {
    if (!inside_) return {};
    const int64_t first = (int64_t{row_} * NumHeads() + head_) * 2 * half_ + lane_;
    return {LoadQuad(params_.qkv, params_.qkv_dtype, first),
            LoadQuad(params_.qkv, params_.qkv_dtype, first + half_)};
  }

  // Normalises, rotates and stores the result of Load(), with `lanes` lanes per head.
  // All lanes of the warp call.
  PBS_DEVICE void Finish(Quads& x, int lanes) const {
    const bool is_value = head_ >= params_.num_heads + params_.num_kv_heads;
    // All lanes of the warp must take part in the sum.
    if (params_.q_norm != nullptr || params_.k_norm != nullptr) {
      const float* norm = head_ < params_.num_heads ? params_.q_norm : params_.k_norm;
      Normalize(x, is_value ? nullptr : norm, lanes);
    }
    if (!inside_) return;
    if (!is_value) Rotate(x);
    Store(x);
  }

 private:
  PBS_DEVICE int NumHeads() const {
    return params_.num_heads + 2 * params_.num_kv_heads;
  }

  PBS_DEVICE void Normalize(Quads& x, const float* weight, int lanes) const {
    float squares = 0;
    PBS_UNROLL
    for (int i = 0; i < kQuad; ++i) {
      squares += x.low.x[i] * x.low.x[i] + x.high.x[i] * x.high.x[i];
    }
    const float mean = SumLanes(squares, lanes) / static_cast<float>(params_.head_dim);
    if (!inside_ || weight == nullptr) return;
    const float factor = 1.0f / Sqrt(mean + params_.epsilon);
    const Quad of_low = LoadQuad(weight, DType::kF32, lane_);
    const Quad of_high = LoadQuad(weight, DType::kF32, lane_ + half_);
    PBS_UNROLL
    for (int i = 0; i < kQuad; ++i) {
      x.low.x[i] *= factor * of_low.x[i];
      x.high.x[i] *= factor * of_high.x[i];
    }
  }

  PBS_DEVICE void Rotate(Quads& quads) const {
    const int64_t pair = int64_t{row_} * half_ + lane_;
    const Quad cosine = LoadQuad(params_.cosines, DType::kF32, pair);
    const Quad sine = LoadQuad(params_.sines, DType::kF32, pair);
    PBS_UNROLL
    for (int i = 0; i < kQuad; ++i) {
      const float x = quads.low.x[i];
      const float y = quads.high.x[i];
      quads.low.x[i] = x * cosine.x[i] - y * sine.x[i];
      quads.high.x[i] = y * cosine.x[i] + x * sine.x[i];
    }
  }

  PBS_DEVICE void Store(const Quads& x) const {
    void* target = params_.q;
    int64_t first = (int64_t{row_} * params_.num_heads + head_) * 2 * half_;
    int kv_head = head_ - params_.num_heads;
    if (kv_head >= 0) {
      target = kv_head < params_.num_kv_heads ? params_.k : params_.v;
      if (kv_head >= params_.num_kv_heads) kv_head -= params_.num_kv_heads;
      first = kv_head * (params_.kv_head_stride / kQuad) + int64_t{row_} * 2 * half_;
    }
    StoreQuad(target, params_.kv_dtype, first + lane_, x.low);
    StoreQuad(target, params_.kv_dtype, first + lane_ + half_, x.high);
  }

  const SplitHeadsParams& params_;
  const int32_t row_;
  const int32_t head_;
  const int lane_;
  const int half_;  // quads of half a head
  const bool inside_;
};

// Grid [ceil(rows * heads / heads of a block)].
struct SplitHeads {
  static constexpr int kThreads = 128;

  static constexpr int64_t Blocks(const SplitHeadsParams& params) {
    const int64_t heads =
        int64_t{params.rows} * (params.num_heads + 2 * params.num_kv_heads);
    const int64_t of_block = kThreads / LanesOfHead(params.head_dim);
    return (heads + of_block - 1) / of_block;
  }

  PBS_DEVICE static void Run(const SplitHeadsParams& params) {
    const int lanes = LanesOfHead(params.head_dim);
    const int heads = params.num_heads + 2 * params.num_kv_heads;
    const int64_t item =
        int64_t{BlockIndex()} * (kThreads / lanes) + ThreadIndex() / lanes;
    const HeadOfRow head(params, static_cast<int32_t>(item / heads),
                         static_cast<int32_t>(item % heads), ThreadIndex() % lanes);
    HeadOfRow::Quads x = head.Load();
    head.Finish(x, lanes);
  }
};

}  // namespace pbs::cuda
