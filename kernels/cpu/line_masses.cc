#include "cpu/line_masses.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace pbs::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr uint32_t kExponentBits = 0x7F800000u;  // all of them: infinite or NaN

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
      weights_(scratch.Floats(num_queries)),
      columns_(scratch.Floats(PaddedKeys(run.plan, s_))),
      distances_(scratch.Floats(PaddedKeys(run.plan, s_))) {}

int64_t LineMasses::Words(const CpuAttentionPlan& plan, const SequenceGeometry& s,
                          int32_t num_queries) {
  return RoundUp(int64_t{num_queries} * plan.depth, kLanePad) +
         int64_t{num_queries} * plan.geometry.block_size +
         3 * RoundUp(num_queries, kLanePad) + 2 * PaddedKeys(plan, s);
}

// Scores of a block, in units of log2 relative to the largest so far, exponentiated:
// [num_queries, block_size]. False when a logit that a query sees is not finite.
bool LineMasses::ScoreBlock(int32_t block, float scale) const {
  const CpuAttentionPlan& plan = run_.plan;
  const int32_t block_size = plan.geometry.block_size;
  const GemmFunction gemm =
      plan.format.pairs ? run_.kernels.gemm_pairs : run_.kernels.gemm;
  gemm({.rows = num_queries_,
        .cols = block_size,
        .depth = plan.depth,
        .a = queries_,
        .a_stride = plan.depth,
        .b = run_.PackedKeys(unit_) + block * run_.BlockWords(),
        .c = scores_,
        .c_stride = block_size});
  const int32_t* positions = run_.Positions(unit_) + int64_t{block} * block_size;
  const int32_t first_position = s_.k_len - num_queries_;
  uint32_t bad = 0;
  for (int32_t r = 0; r < num_queries_; ++r) {
    const float* row = scores_ + int64_t{r} * block_size;
    for (int32_t i = 0; i < block_size; ++i) {
      const uint32_t exponent = std::bit_cast<uint32_t>(row[i]) & kExponentBits;
      const bool seen = positions[i] <= first_position + r;
      bad |= static_cast<uint32_t>(exponent == kExponentBits) &
             static_cast<uint32_t>(seen);
    }
  }
  run_.kernels.softmax({.rows = num_queries_,
                        .cols = block_size,
                        .head_dim = 0,  // probabilities only
                        .scale = scale,
                        .positions = positions,
                        .first_query = first_position,
                        .scores = scores_,
                        .pairs = nullptr,
                        .row_max = row_max_,
                        .row_sum = row_sum_,
                        .out = nullptr});
  return bad == 0;
}

// Adds the probabilities of a block's rows, each times its weight.
void LineMasses::AddBlock(int32_t block) {
  const int32_t block_size = run_.plan.geometry.block_size;
  const int32_t begin = block * block_size;
  for (int32_t r = 0; r < num_queries_; ++r) {
    float* row = scores_ + int64_t{r} * block_size;
    const int32_t position = s_.k_len - num_queries_ + r;
    for (int32_t i = 0; i < block_size; ++i) row[i] *= weights_[r];
    for (int32_t i = 0; i < block_size; ++i) columns_[begin + i] += row[i];
    // Slots after the query: only where keys are sorted, and unseen otherwise.
    const int32_t before = std::clamp(position - begin + 1, 0, block_size);
    for (int32_t i = 0; i < before; ++i) distances_[position - begin - i] += row[i];
    for (int32_t i = before; i < block_size; ++i) distances_[0] += row[i];
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
  const float scale = kLog2E / std::sqrt(static_cast<float>(width));
  std::fill_n(row_max_, num_queries_, -INFINITY);
  std::fill_n(row_sum_, num_queries_, 0.0f);
  for (int32_t block = 0; block < s_.num_key_blocks; ++block) {
    if (!ScoreBlock(block, scale)) return false;
  }
  std::fill_n(columns_, PaddedKeys(plan, s_), 0.0f);
  std::fill_n(distances_, PaddedKeys(plan, s_), 0.0f);
  // The maxima stay. The sums that the second pass adds to are not read.
  for (int32_t r = 0; r < num_queries_; ++r) {
    weights_[r] = 1.0f / (row_sum_[r] * static_cast<float>(num_queries_));
  }
  for (int32_t block = 0; block < s_.num_key_blocks; ++block) {
    ScoreBlock(block, scale);
    AddBlock(block);
  }
  return true;
}

}  // namespace pbs::cpu
