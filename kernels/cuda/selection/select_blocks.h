// Makes the lists of key blocks. The list of a query block has the fewest past blocks
// whose share of the pooled attention mass reaches the threshold (arXiv 2510.21270,
// section 3.3), and those of write_list.h. With two bands (prism, arXiv 2602.08426) the
// mass is estimated from the columns of each band, and a block is kept by either.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/mass_cut.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/stamp_time.h"
#include "cuda/selection/write_list.h"

namespace pbs::cuda {

// Grid [num_heads, total_groups], 128 threads; kRows = params.group_blocks (4 or 8)
// query blocks of one head and sequence. kNumBands: 1, all columns; or kBands. Dynamic
// shared memory: SelectionSharedBytes().
//
// Thirty bisections (mass_cut.h) find the smallest probability that is needed.
template <class Element, int kRows, int kNumBands = 1>
class SelectBlocks {
 public:
  static constexpr int kThreads = 128;
  static constexpr int kResidentBlocks = 5;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    StampTime(params.ordered);
    SelectBlocks(params, PlaceInGrid(params.total_groups)).Run();
  }

 protected:
  PBS_DEVICE SelectBlocks(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        head_(place.head),
        order_head_(place.head / Members(params)),
        sequence_index_(FindSequence<&SequenceRecord::group_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        first_row_((place.item - sequence_.group_begin) * kRows),
        logits_(reinterpret_cast<float*>(SharedMemory())),
        queries_(logits_ + kRows * params.logit_stride),
        marks_(reinterpret_cast<uint32_t*>(queries_ + kRows * params.head_dim)) {}

  PBS_DEVICE void Run() {
    if (sequence_.sparse == 0) return;
    const int rows = NumRows();
    LoadQueries(rows);
    PBS_UNROLL
    for (int band = 0; band < kNumBands; ++band) {
      SyncThreads();  // queries are there, and nobody reads the last band's weights
      Score(band, NumCandidatesOf(rows - 1));
      SyncThreads();
      for (int row = ThreadIndex() / 32; row < rows; row += kThreads / 32) {
        const MassCut cut = Select(row, ThresholdOf(params_, head_, band));
        if (band + 1 < kNumBands) {
          Mark(row, cut);
        } else {
          Write(row, cut);
        }
      }
    }
  }

  // Query blocks of the group.
  PBS_DEVICE int NumRows() const {
    const int left = sequence_.num_query_blocks - first_row_;
    return left < kRows ? left : kRows;
  }

  // Means of the query blocks, [head_dim, kRows], so that one load reads a column.
  PBS_DEVICE void LoadQueries(int rows) {
    const int64_t stride = int64_t{params_.num_heads} * params_.head_dim;
    const float* source = params_.pooled_queries +
                          (sequence_.query_block_begin + first_row_) * stride +
                          head_ * params_.head_dim;
    for (int i = ThreadIndex(); i < kRows * params_.head_dim; i += kThreads) {
      const int row = i / params_.head_dim;
      const int column = i % params_.head_dim;
      const float mean = row < rows ? LoadGlobal(source + row * stride + column) : 0.0f;
      StoreShared(
          queries_ + column * kRows + row,
          params_.block_rounding == ScoreRounding::kNone ? mean : Element::Round(mean));
    }
  }

  PBS_DEVICE int Block(int row) const {
    return sequence_.first_query_block + first_row_ + row;
  }
  PBS_DEVICE int NumCandidatesOf(int row) const {
    return NumCandidates(params_, Block(row));
  }

  // Calls body(column) for the columns of a band.
  template <class Body>
  PBS_DEVICE void ForEachColumn(int band, Body&& body) const {
    if constexpr (kNumBands == 1) {
      for (int d = 0; d < params_.head_dim; ++d) body(d);
    } else {
      const PairBand pairs = params_.bands[band];
      for (int half = 0; half < params_.head_dim; half += params_.head_dim / 2) {
        for (int pair = pairs.begin; pair < pairs.end; ++pair) body(half + pair);
      }
    }
  }

  PBS_DEVICE float Divisor(int band) const {
    if constexpr (kNumBands == 1) {
      return Sqrt(static_cast<float>(params_.head_dim));
    } else {
      return LoadGlobal(params_.band_divisors +
                        (head_ * params_.num_sequences + sequence_index_) * kNumBands +
                        band);
    }
  }

  // Computes scaled logits of all rows with the blocks [0, count).
  PBS_DEVICE void Score(int band, int count) {
    const float* keys =
        params_.pooled_keys +
        int64_t{order_head_} * params_.head_dim * params_.total_key_blocks +
        sequence_.key_block_begin;
    const float divisor = Divisor(band);
    for (int block = ThreadIndex(); block < count; block += kThreads) {
      float sums[kRows] = {};
      ForEachColumn(band, [&](int d) {
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
      });
      PBS_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const float logit = params_.block_rounding == ScoreRounding::kNone
                                ? sums[row] / divisor
                                : Element::Round(Element::Round(sums[row]) / divisor);
        StoreShared(logits_ + row * params_.logit_stride + block, logit);
      }
    }
  }

  // Converts the logits of a row to weights. One warp calls.
  PBS_DEVICE MassCut Select(int row, float threshold) {
    float* weights = logits_ + row * params_.logit_stride;
    const int candidates = NumCandidatesOf(row);
    if (candidates == 0) return SelectsAll();
    // Selects none, but the list must still be valid.
    if (!Exponentiate(weights, candidates)) return SelectsNone();
    if (threshold >= 1) return SelectsAll();
    return CutByMass(weights, candidates, threshold * MassFrom(weights, candidates, 0),
                     kOneBits);
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

  // Whether a row's block is selected; called as IsSelected() of mass_cut.h.
  PBS_DEVICE bool Selects(int row, MassCut& cut, int block, bool is_earlier) const {
    return IsSelected(logits_ + row * params_.logit_stride, cut, block, is_earlier);
  }

  PBS_DEVICE uint32_t* MarksOf(int row) const {
    return marks_ + row * (params_.logit_stride / 32);
  }

  // Keeps what is selected for the list, one bit per block.
  PBS_DEVICE void Mark(int row, MassCut cut) const {
    const int lane = ThreadIndex() % 32;
    const int end = OwnBegin(Block(row), params_.blocks_per_segment);
    for (int first = 0; first < end; first += 32) {
      const uint32_t marks =
          Ballot(Selects(row, cut, first + lane, first + lane < end));
      if (lane == 0) StoreShared(MarksOf(row) + first / 32, marks);
    }
  }

  PBS_DEVICE void Write(int row, MassCut cut) const {
    const ListPlace place = {head_, sequence_index_, first_row_ + row};
    WriteList(params_, sequence_, place, [&](int block, bool is_earlier) {
      bool keeps = Selects(row, cut, block, is_earlier);
      if constexpr (kNumBands > 1) {
        const uint32_t marks = LoadShared(MarksOf(row) + block / 32);
        keeps = keeps || (marks >> block % 32 & 1) != 0;
      }
      return keeps;
    });
  }

  const SelectionParams& params_;
  const int head_;
  const int order_head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int first_row_;   // first query block, in the sequence
  float* const logits_;   // [kRows, logit_stride]
  float* const queries_;  // [head_dim, kRows]
  // [kRows, logit_stride / 32], with more than one band
  uint32_t* const marks_;
};

}  // namespace pbs::cuda
