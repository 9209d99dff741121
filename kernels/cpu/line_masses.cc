#include "cpu/line_masses.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace pbs::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

int64_t PaddedKeys(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  return int64_t{s.num_key_blocks} * plan.geometry.block_size;
}

}  // namespace

LineMasses::LineMasses(const AttentionRun& run, const Unit& unit, int32_t num_queries,
                       ItemScratch& scratch)
    : run_(run),
      unit_(unit),
      s_(run.Sequence(unit)),
      num_queries_(std::min(num_queries, s_.q_len)),
      queries_(scratch.Words(int64_t{num_queries} * run.plan.depth)),
      scores_(scratch.Floats(int64_t{num_queries} * run.plan.geometry.block_size)),
      row_max_(scratch.Floats(num_queries)),
      row_sum_(scratch.Floats(num_queries)),
      columns_(scratch.Floats(PaddedKeys(run.plan, s_))),
      distances_(scratch.Floats(PaddedKeys(run.plan, s_))) {}

int64_t LineMasses::Words(const CpuAttentionPlan& plan, const SequenceGeometry& s,
                          int32_t num_queries) {
  return RoundUp(int64_t{num_queries} * plan.depth, kLanePad) +
         int64_t{num_queries} * plan.geometry.block_size +
         2 * RoundUp(num_queries, kLanePad) + 2 * PaddedKeys(plan, s);
}

// Calls body(row, slot, logit in units of log2) for every key that a query sees.
template <class Body>
void LineMasses::ForEachLogit(int32_t width, Body&& body) const {
  const CpuAttentionPlan& plan = run_.plan;
  const int32_t block_size = plan.geometry.block_size;
  const int32_t* positions = run_.Positions(unit_);
  const GemmFunction gemm =
      plan.format.pairs ? run_.kernels.gemm_pairs : run_.kernels.gemm;
  const float scale = kLog2E / std::sqrt(static_cast<float>(width));
  const int32_t first_position = s_.k_len - num_queries_;
  for (int32_t block = 0; block < s_.num_key_blocks; ++block) {
    gemm({.rows = num_queries_,
          .cols = block_size,
          .depth = plan.depth,
          .a = queries_,
          .a_stride = plan.depth,
          .b = run_.PackedKeys(unit_) + block * run_.BlockWords(),
          .c = scores_,
          .c_stride = block_size});
    const int32_t begin = block * block_size;
    for (int32_t r = 0; r < num_queries_; ++r) {
      const float* row = scores_ + static_cast<int64_t>(r) * block_size;
      for (int32_t i = 0; i < block_size; ++i) {
        if (positions[begin + i] > first_position + r) continue;
        body(r, begin + i, row[i] * scale);
      }
    }
  }
}

bool LineMasses::Measure(int32_t member, int32_t width) {
  const CpuAttentionPlan& plan = run_.plan;
  for (int32_t r = 0; r < num_queries_; ++r) {
    RowToWords(run_.kernels, plan.format,
               run_.QueryRow(unit_, run_.QueryHead(unit_, member),
                             s_.q_len - num_queries_ + r),
               plan.geometry.head_dim, queries_ + static_cast<int64_t>(r) * plan.depth);
  }
  std::fill_n(row_max_, num_queries_, -INFINITY);
  std::fill_n(row_sum_, num_queries_, 0.0f);
  bool finite = true;
  ForEachLogit(width, [&](int32_t r, int32_t, float logit) {
    finite &= std::isfinite(logit);
    if (logit > row_max_[r]) {
      row_sum_[r] *= std::exp2(row_max_[r] - logit);
      row_max_[r] = logit;
    }
    row_sum_[r] += std::exp2(logit - row_max_[r]);
  });
  if (!finite) return false;
  std::fill_n(columns_, PaddedKeys(plan, s_), 0.0f);
  std::fill_n(distances_, PaddedKeys(plan, s_), 0.0f);
  const int32_t first_position = s_.k_len - num_queries_;
  const float share = 1.0f / static_cast<float>(num_queries_);
  ForEachLogit(width, [&](int32_t r, int32_t slot, float logit) {
    const float p = std::exp2(logit - row_max_[r]) / row_sum_[r] * share;
    columns_[slot] += p;
    // With sorted keys a slot can lie behind its query.
    distances_[std::max(first_position + r - slot, 0)] += p;
  });
  return true;
}

}  // namespace pbs::cpu
