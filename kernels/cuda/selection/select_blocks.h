// Makes the lists of key blocks. The list of a query block has the fewest past blocks
// whose share of the pooled attention mass reaches the threshold, the block of key 0,
// the blocks of the own segment (arXiv 2510.21270, section 3.3), and those that the
// options force.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/stamp_time.h"

namespace pbs::cuda {

// Grid [num_heads, total_groups], 128 threads; kRows = params.group_blocks (4 or 8)
// query blocks of one head and sequence. Dynamic shared memory: SelectionSharedBytes().
//
// It needs no sort, because the bits of non-negative floats are ordered like the
// floats. Thirty bisections of the range of bits find the smallest probability that is
// needed. Mass is summed in the same order each time, so that it never falls when more
// blocks are summed.
template <class Element, int kRows>
class SelectBlocks {
 public:
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    StampTime(params.ordered);
    SelectBlocks(params, PlaceInGrid(params.total_groups)).Run();
  }

 private:
  PBS_DEVICE SelectBlocks(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        head_(place.head),
        order_head_(place.head / Members(params)),
        sequence_index_(FindSequence<&SequenceRecord::group_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        first_row_((place.item - sequence_.group_begin) * kRows),
        logits_(reinterpret_cast<float*>(SharedMemory())),
        queries_(logits_ + kRows * params.logit_stride) {}

  PBS_DEVICE void Run() {
    if (sequence_.sparse == 0) return;
    const int left = sequence_.num_query_blocks - first_row_;
    const int rows = left < kRows ? left : kRows;
    const int64_t stride = int64_t{params_.num_heads} * params_.head_dim;
    const float* source = params_.pooled_queries +
                          (sequence_.query_block_begin + first_row_) * stride +
                          head_ * params_.head_dim;
    // [head_dim, kRows], so that one load reads a column.
    for (int i = ThreadIndex(); i < kRows * params_.head_dim; i += kThreads) {
      const int row = i / params_.head_dim;
      const int column = i % params_.head_dim;
      const float mean = row < rows ? LoadGlobal(source + row * stride + column) : 0.0f;
      StoreShared(
          queries_ + column * kRows + row,
          params_.block_rounding == ScoreRounding::kNone ? mean : Element::Round(mean));
    }
    SyncThreads();
    Score(NumCandidates(rows - 1));
    SyncThreads();
    for (int row = ThreadIndex() / 32; row < rows; row += kThreads / 32) Select(row);
  }

  PBS_DEVICE int Block(int row) const {
    return sequence_.first_query_block + first_row_ + row;
  }
  PBS_DEVICE int NumCandidates(int row) const {
    return params_.own_has_mass != 0 ? Block(row) + 1
                                     : OwnBegin(Block(row), params_.blocks_per_segment);
  }

  // Computes scaled logits of all rows with the blocks [0, count).
  PBS_DEVICE void Score(int count) {
    const float* keys =
        params_.pooled_keys +
        int64_t{order_head_} * params_.head_dim * params_.total_key_blocks +
        sequence_.key_block_begin;
    const float root = Sqrt(static_cast<float>(params_.head_dim));
    for (int block = ThreadIndex(); block < count; block += kThreads) {
      float sums[kRows] = {};
      for (int d = 0; d < params_.head_dim; ++d) {
        const float key =
            LoadGlobal(keys + int64_t{d} * params_.total_key_blocks + block);
        PBS_UNROLL
        for (int row = 0; row < kRows; row += 4) {
          const Words4 queries =
              LoadShared(reinterpret_cast<const Words4*>(queries_ + d * kRows + row));
          PBS_UNROLL
          for (int i = 0; i < 4; ++i) {
            sums[row + i] += BitsToFloat(queries.words[i]) * key;
          }
        }
      }
      PBS_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const float logit = params_.block_rounding == ScoreRounding::kNone
                                ? sums[row] / root
                                : Element::Round(Element::Round(sums[row]) / root);
        StoreShared(logits_ + row * params_.logit_stride + block, logit);
      }
    }
  }

  // One warp calls.
  PBS_DEVICE void Select(int row) {
    float* weights = logits_ + row * params_.logit_stride;
    const int candidates = NumCandidates(row);
    uint32_t least = 0;    // bits of the smallest selected weight
    int ties = INT32_MAX;  // the number of selected blocks with exactly that weight
    if (candidates > 0 && !Exponentiate(weights, candidates)) {
      least = 0xFFFFFFFFu;  // selects none, but the list must still be valid
      ties = 0;
    } else if (candidates > 0 && params_.threshold < 1) {
      const float wanted = params_.threshold * MassFrom(weights, candidates, 0);
      // Blocks of at least this weight have too little mass.
      uint32_t above = kOneBits + 1;
      while (above - least > 1) {
        const uint32_t middle = least + (above - least) / 2;
        if (MassFrom(weights, candidates, middle) >= wanted) {
          least = middle;
        } else {
          above = middle;
        }
      }
      if (least > 0) {
        const float missing = wanted - MassFrom(weights, candidates, least + 1);
        ties = static_cast<int>(Ceil(missing / BitsToFloat(least)));
        if (ties < 1) ties = 1;
      }
    }
    Write(row, weights, least, ties);
  }

  // Converts logits to weights in (0, 1]. Sets the flag and returns false when one is
  // not finite.
  PBS_DEVICE bool Exponentiate(float* weights, int count) {
    const int lane = ThreadIndex() % 32;
    float top = -kInfinity;
    bool finite = true;
    for (int i = lane; i < count; i += 32) {
      const float logit = LoadShared(weights + i);
      finite = finite && logit > -kInfinity && logit < kInfinity;
      top = Max(top, logit);
    }
    for (int mask = 1; mask < 32; mask *= 2) top = Max(top, ShuffleXor(top, mask));
    if (Ballot(!finite) != 0) {
      if (lane == 0) StoreGlobal(params_.non_finite, 1);
      return false;
    }
    for (int i = lane; i < count; i += 32) {
      StoreShared(weights + i, Exp2((LoadShared(weights + i) - top) * kLog2E));
    }
    return true;
  }

  // Sum of the weights whose bits are at least `bits`.
  PBS_DEVICE static float MassFrom(const float* weights, int count, uint32_t bits) {
    float sum = 0;
    for (int i = ThreadIndex() % 32; i < count; i += 32) {
      const float weight = LoadShared(weights + i);
      if (FloatBits(weight) >= bits) sum += weight;
    }
    for (int mask = 1; mask < 32; mask *= 2) sum += ShuffleXor(sum, mask);
    return sum;
  }

  // Writes the list of a row, ascending.
  PBS_DEVICE void Write(int row, const float* weights, uint32_t least, int ties) {
    const int lane = ThreadIndex() % 32;
    const uint32_t before = (1u << lane) - 1;
    const int own_begin = OwnBegin(Block(row), params_.blocks_per_segment);
    const int own_end =
        OwnEnd(Block(row), params_.blocks_per_segment, sequence_.num_key_blocks);
    const int forced =
        params_.force_first_block != 0
            ? LoadGlobal(params_.first_block + order_head_ * params_.num_sequences +
                         sequence_index_)
            : -1;
    const int query_block = first_row_ + row;
    const bool dense_tail =
        sequence_.num_query_blocks - query_block <= params_.dense_tail_blocks;
    const int window_begin = dense_tail ? 0 : Block(row) + 1 - params_.window_blocks;
    uint16_t* list = params_.entries + EntryOffset(sequence_, head_, first_row_ + row,
                                                   params_.blocks_per_segment);
    int count = 0;
    for (int first = 0; first < own_begin; first += 32) {
      const int block = first + lane;
      const bool past = block < own_begin;
      const uint32_t bits = past ? FloatBits(LoadShared(weights + block)) : 0;
      const uint32_t tied = Ballot(past && bits == least);
      bool keep = past && (bits > least ||
                           (bits == least && PopulationCount(tied & before) < ties));
      keep = keep || (past && (block == forced || block < params_.sink_blocks ||
                               block >= window_begin));
      ties -= PopulationCount(tied);
      const uint32_t kept = Ballot(keep);
      if (keep) {
        StoreGlobal(list + count + PopulationCount(kept & before),
                    static_cast<uint16_t>(block));
      }
      count += PopulationCount(kept);
    }
    for (int block = own_begin + lane; block < own_end; block += 32) {
      StoreGlobal(list + count + block - own_begin, static_cast<uint16_t>(block));
    }
    if (lane == 0) {
      StoreGlobal(params_.counts +
                      ListRow(sequence_, params_.num_heads, head_, first_row_ + row),
                  static_cast<uint16_t>(count + own_end - own_begin));
    }
  }

  static constexpr uint32_t kOneBits = 0x3F800000u;  // bits of 1.0f

  const SelectionParams& params_;
  const int head_;
  const int order_head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int first_row_;   // first query block, in the sequence
  float* const logits_;   // [kRows, logit_stride]
  float* const queries_;  // [head_dim, kRows]
};

}  // namespace pbs::cuda
