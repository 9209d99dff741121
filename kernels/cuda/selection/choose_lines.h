// Chooses what a head reads (flexprefill, arXiv 2502.20766): the block columns and
// block distances that hold most of the last queries' attention, or, where an estimate
// from block means is near that attention, also blocks by their means (select_grid.h).
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/diagonals.h"
#include "cuda/selection/mass_cut.h"
#include "cuda/selection/mass_within.h"
#include "cuda/selection/sequences.h"
#include "cuda/tiles/block_values.h"

namespace pbs::cuda {

// Grid [num_heads, num_sequences], 512 threads. Dynamic shared memory:
// ChooseLinesSharedBytes().
template <class Element>
class ChooseLines {
 public:
  static constexpr int kThreads = 512;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    ChooseLines(params, PlaceInGrid(params.num_sequences)).Run();
  }

 private:
  using Values = BlockValues<kThreads>;
  static_assert(Values::kSharedBytes == kBlockValuesBytes);

  PBS_DEVICE ChooseLines(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        head_(place.head),
        sequence_index_(place.item),
        sequence_(LoadGlobal(params.sequences + place.item)),
        blocks_(sequence_.num_key_blocks),
        values_(SharedMemory()),
        columns_(reinterpret_cast<float*>(SharedMemory() + Values::kSharedBytes)),
        diagonals_(columns_ + params.logit_stride),
        estimate_(diagonals_ + params.logit_stride),
        mean_(estimate_ + params.logit_stride) {}

  PBS_DEVICE void Run() {
    if (sequence_.sparse == 0) return;
    MergeDiagonals();
    AverageLastQueries();
    SyncThreads();
    AddEarlyKeys();
    EstimateColumns();
    SyncThreads();
    SumBlocks();
    SyncThreads();
    const bool by_grid = Distance() < params_.lines.tau;  // false for NaN
    int num_columns = 1;
    int num_distances = 1;
    if (!by_grid) {
      num_columns = CountBlocks(Columns());
      num_distances = CountBlocks(Diagonals());
    }
    if (ThreadIndex() == 0) Force(by_grid);
    SyncThreads();
    const int warp = ThreadIndex() / 32;
    if (warp == 0) {
      Keep(columns_, num_columns, [&](int j) { return j; });
    } else if (warp == 1) {
      Keep(diagonals_, num_distances,
           [&](int j) { return params_.total_key_blocks + blocks_ - 1 - j; });
    }
  }

  PBS_DEVICE float* Columns() const {
    return params_.lines.columns + FirstLine(params_, sequence_, head_);
  }
  PBS_DEVICE float* Diagonals() const {
    return params_.lines.diagonals + FirstLine(params_, sequence_, head_);
  }

  // Adds to each chunk's diagonals what the chunk before has of them.
  PBS_DEVICE void MergeDiagonals() const {
    const int keys = params_.chunk_blocks * kBlockTokens;  // of a chunk
    for (int x = keys + ThreadIndex(); x < blocks_ * kBlockTokens; x += kThreads) {
      if (x % keys >= kProxies) continue;
      StoreGlobal(Diagonals() + x, MassOfDiagonal(params_, sequence_, head_, x));
    }
  }

  // Sorted keys may lie behind the query: their diagonals are after the last one, and
  // count as distance 0. One warp calls.
  PBS_DEVICE void AddEarlyKeys() const {
    if (ThreadIndex() >= 32) return;
    float sum = 0;
    for (int x = sequence_.k_len + ThreadIndex(); x < blocks_ * kBlockTokens; x += 32) {
      sum += LoadGlobal(Diagonals() + x);
      StoreGlobal(Diagonals() + x, 0.0f);
    }
    const int last_chunk = (blocks_ - 1) / params_.chunk_blocks;
    for (int i = ThreadIndex(); i < kProxies; i += 32) {
      sum += RestOfChunk(params_, sequence_, head_, last_chunk, i);
    }
    sum = SumOfWarp(sum);
    if (ThreadIndex() != 0) return;
    float* last = Diagonals() + sequence_.k_len - 1;
    StoreGlobal(last, LoadGlobal(last) + sum);
  }

  PBS_DEVICE void AverageLastQueries() const {
    const int rows = sequence_.q_len < kProxies ? sequence_.q_len : kProxies;
    const uint16_t* first =
        params_.q.data + params_.q.strides.Offset(sequence_index_, sequence_.q_begin,
                                                  head_, sequence_.q_len - rows);
    for (int pair = ThreadIndex(); pair < params_.head_dim / 2; pair += kThreads) {
      float low = 0;
      float high = 0;
      for (int row = 0; row < rows; ++row) {
        const uint32_t word = LoadGlobal(reinterpret_cast<const uint32_t*>(
            first + row * params_.q.strides.row + 2 * pair));
        low += Element::Low(word);
        high += Element::High(word);
      }
      StoreShared(mean_ + 2 * pair, low / static_cast<float>(rows));
      StoreShared(mean_ + 2 * pair + 1, high / static_cast<float>(rows));
    }
  }

  // Softmax of the products of the mean query and the block means of keys. Sets the
  // flag where a product is not finite.
  PBS_DEVICE void EstimateColumns() {
    const float* keys = params_.pooled_keys +
                        int64_t{head_ / Members(params_)} * params_.head_dim *
                            params_.total_key_blocks +
                        sequence_.key_block_begin;
    float top = -kInfinity;
    bool finite = true;
    for (int j = ThreadIndex(); j < blocks_; j += kThreads) {
      float sum = 0;
      for (int d = 0; d < params_.head_dim; ++d) {
        sum += LoadShared(mean_ + d) *
               LoadGlobal(keys + int64_t{d} * params_.total_key_blocks + j);
      }
      const float logit = sum / Sqrt(static_cast<float>(params_.head_dim));
      finite = finite && logit > -kInfinity && logit < kInfinity;
      top = Max(top, logit);
      StoreShared(estimate_ + j, logit);
    }
    if (!finite) StoreGlobal(params_.non_finite, 1);
    top = values_.Largest(top);
    float sum = 0;
    for (int j = ThreadIndex(); j < blocks_; j += kThreads) {
      const float weight = Exp2((LoadShared(estimate_ + j) - top) * kLog2E);
      StoreShared(estimate_ + j, weight);
      sum += weight;
    }
    sum = values_.Sum(sum);
    for (int j = ThreadIndex(); j < blocks_; j += kThreads) {
      StoreShared(estimate_ + j, LoadShared(estimate_ + j) / sum);
    }
  }

  // Masses of the blocks of columns and of diagonals; a warp has a block.
  PBS_DEVICE void SumBlocks() const {
    const int lane = ThreadIndex() % 32;
    for (int j = ThreadIndex() / 32; j < blocks_; j += kThreads / 32) {
      float column = 0;
      float diagonal = 0;
      PBS_UNROLL
      for (int i = 0; i < kBlockTokens; i += 32) {
        const int at = j * kBlockTokens + i + lane;
        column += LoadGlobal(Columns() + at);
        diagonal += LoadGlobal(Diagonals() + at);
      }
      column = SumOfWarp(column);
      diagonal = SumOfWarp(diagonal);
      if (lane != 0) continue;
      StoreShared(columns_ + j, column);
      StoreShared(diagonals_ + j, diagonal);
    }
  }

  // Root of the Jensen-Shannon divergence of estimate and columns, with the natural
  // logarithm. In f64: the terms nearly cancel where both are near.
  PBS_DEVICE double Distance() {
    double divergence = 0;
    for (int j = ThreadIndex(); j < blocks_; j += kThreads) {
      const double masses[] = {LoadShared(estimate_ + j), LoadShared(columns_ + j)};
      const double middle = (masses[0] + masses[1]) / 2;
      PBS_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (masses[i] > 0 || params_.lines.zero_is_far != 0) {
          divergence += masses[i] / 2 * Log(masses[i] / middle);
        }
      }
    }
    divergence = values_.Sum(divergence);
    return Sqrt(divergence < 0 ? 0 : divergence);  // rounding; passes NaN on
  }

  // The fewest lines whose mass passes gamma, as a number of blocks.
  PBS_DEVICE int CountBlocks(const float* lines) {
    const MassWithin within =
        KeepWithin<kThreads>(lines, sequence_.k_len, params_.lines.gamma, values_);
    const int64_t left = sequence_.k_len - within.num_above;
    const int64_t count = within.num_above + (within.ties < left ? within.ties : left);
    const auto blocks = static_cast<int>((count + 1) / kBlockTokens) + 1;
    return blocks < blocks_ ? blocks : blocks_;
  }

  // Blocks that are kept in any case become the largest.
  PBS_DEVICE void Force(bool by_grid) const {
    const float largest = kInfinity;
    if (params_.force_first_block != 0) {
      const int first = LoadGlobal(params_.first_block +
                                   head_ / Members(params_) * params_.num_sequences +
                                   sequence_index_);
      StoreShared(columns_ + first, largest);
    }
    StoreShared(diagonals_ + blocks_ - 1, largest);
    StoreGlobal(params_.lines.by_grid + head_ * params_.num_sequences + sequence_index_,
                by_grid ? 1 : 0);
  }

  // Stores which blocks are among the `wanted` largest, at place(block). One warp
  // calls.
  template <class Place>
  PBS_DEVICE void Keep(const float* masses, int wanted, Place&& place) const {
    MassCut cut = CutByCount(masses, blocks_, wanted);
    uint8_t* kept = params_.lines.kept + int64_t{2} * head_ * params_.total_key_blocks +
                    sequence_.key_block_begin;
    for (int first = 0; first < blocks_; first += 32) {
      const int j = first + ThreadIndex() % 32;
      const bool keeps = IsSelected(masses, cut, j, j < blocks_);
      if (j < blocks_) StoreGlobal(kept + place(j), static_cast<uint8_t>(keeps));
    }
  }

  const SelectionParams& params_;
  const int head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int blocks_;  // of keys
  Values values_;
  // Masses by block, [logit_stride]. Shared memory, as the arrays below.
  float* const columns_;
  float* const diagonals_;
  float* const estimate_;  // of the columns
  float* const mean_;      // of the last queries, [head_dim]
};

}  // namespace pbs::cuda
