// The attention of a sequence's last queries, summed along columns (keys) and diagonals
// (distances between query and key). flexprefill and minference select by it.
#pragma once

#include <cstdint>

#include "cpu/attention_select.h"

namespace pbs::cpu {

class LineMasses {
 public:
  // Of the last `num_queries` queries, or of all when there are fewer.
  LineMasses(const AttentionRun& run, const Unit& unit, int32_t num_queries,
             ItemScratch& scratch);
  static int64_t Words(const CpuAttentionPlan& plan, const SequenceGeometry& s,
                       int32_t num_queries);

  // Measures query head `member`; logits are products over sqrt(`width`). False when
  // one is not finite.
  bool Measure(int32_t member, int32_t width);

  int32_t num_queries() const { return num_queries_; }
  const uint32_t* queries() const { return queries_; }  // words, [num_queries, depth]
  // Mean probability of each key slot, and of each distance; 0 beyond k_len.
  float* columns() { return columns_; }      // [key blocks x block_size]
  float* distances() { return distances_; }  // [key blocks x block_size]

 private:
  bool ScoreBlock(int32_t block, float scale) const;
  void AddBlock(int32_t block);

  const AttentionRun& run_;
  const Unit& unit_;
  const SequenceGeometry& s_;
  int32_t num_queries_;
  uint32_t* queries_;
  float* scores_;   // [num_queries, block_size]
  float* row_max_;  // in units of log2
  float* row_sum_;
  float* weights_;  // of a row's probabilities in their mean
  float* columns_;
  float* distances_;
};

}  // namespace pbs::cpu
