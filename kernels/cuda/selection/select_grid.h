// Lists of flexprefill. A head whose estimate is near the last queries' attention keeps
// the largest probabilities of all its query blocks together, within gamma of their
// sum; each has a softmax over block means. Other heads keep lines (choose_lines.h).
//
// Probabilities are stored, because the cut is one of the whole head: 4 bytes for each
// entry that a list may have.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/mass_within.h"
#include "cuda/selection/select_blocks.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/write_list.h"
#include "cuda/tiles/block_values.h"

namespace pbs::cuda {

PBS_DEVICE bool SelectsByGrid(const SelectionParams& params, int head,
                              int sequence_index) {
  return params.lines.has_grid != 0 &&
         LoadGlobal(params.lines.by_grid + head * params.num_sequences +
                    sequence_index) != 0;
}

// Grid, threads and shared memory as SelectBlocks. Stores the probabilities of the
// query blocks; places of a list after the last candidate get 0.
template <class Element, int kRows>
class ScoreGrid : SelectBlocks<Element, kRows> {
 public:
  using Base = SelectBlocks<Element, kRows>;
  using Base::kResidentBlocks;
  using Base::kThreads;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    ScoreGrid(params, PlaceInGrid(params.total_groups)).Run();
  }

 private:
  using Base::params_;
  using Base::sequence_;

  PBS_DEVICE ScoreGrid(const SelectionParams& params, const GridPlace& place)
      : Base(params, place) {}

  PBS_DEVICE void Run() {
    if (sequence_.sparse == 0) return;
    if (!SelectsByGrid(params_, this->head_, this->sequence_index_)) return;
    const int rows = this->NumRows();
    this->LoadQueries(rows);
    SyncThreads();
    this->Score(/*band=*/0, this->NumCandidatesOf(rows - 1));
    SyncThreads();
    for (int row = ThreadIndex() / 32; row < rows; row += kThreads / 32) Store(row);
  }

  // One warp calls.
  PBS_DEVICE void Store(int row) {
    float* weights = this->logits_ + row * params_.logit_stride;
    int candidates = this->NumCandidatesOf(row);
    if (candidates > 0 && !this->Exponentiate(weights, candidates)) candidates = 0;
    const float sum = MassFrom(weights, candidates, 0);
    const int end =
        OwnEnd(this->Block(row), params_.blocks_per_segment, sequence_.num_key_blocks);
    float* target =
        params_.lines.grid + EntryOffset(sequence_, this->head_, this->first_row_ + row,
                                         params_.blocks_per_segment);
    for (int j = ThreadIndex() % 32; j < end; j += 32) {
      StoreGlobal(target + j, j < candidates ? LoadShared(weights + j) / sum : 0.0f);
    }
  }
};

// Grid [num_heads, num_sequences], 512 threads. Dynamic shared memory: kSharedBytes.
class CutGrid {
 public:
  static constexpr int kThreads = 512;
  static constexpr int kSharedBytes =
      BlockValues<kThreads>::kSharedBytes + kThreads * 4;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    CutGrid(params, PlaceInGrid(params.num_sequences)).Run();
  }

 private:
  PBS_DEVICE CutGrid(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        sequence_(LoadGlobal(params.sequences + place.item)),
        by_grid_(sequence_.sparse != 0 &&
                 SelectsByGrid(params, place.head, place.item)),
        begin_(EntryOffset(sequence_, place.head, 0, params.blocks_per_segment)),
        target_(params.lines.cuts + place.head * params.num_sequences + place.item) {}

  PBS_DEVICE void Run() {
    if (!by_grid_) return;
    BlockValues<kThreads> values(SharedMemory());
    const float* grid = params_.lines.grid + begin_;
    const MassWithin within = KeepWithin<kThreads>(
        grid, sequence_.entries_per_head,
        params_.lines.gamma * static_cast<float>(RowsWithMass()), values);
    if (within.ties == 0 || within.least == 0) {  // no ties, or all values
      if (ThreadIndex() == 0) {
        const int64_t end = within.ties == 0 ? 0 : sequence_.entries_per_head;
        StoreGlobal(target_, {begin_ + end, within.least, 0});
      }
      return;
    }
    FindEnd(grid, within);
  }

  // Query blocks that have candidates. Each has mass 1.
  PBS_DEVICE int RowsWithMass() const {
    int rows = 0;
    for (int i = 0; i < params_.blocks_per_segment; ++i) {
      const int block = sequence_.first_query_block + i;
      if (i < sequence_.num_query_blocks && NumCandidates(params_, block) == 0) ++rows;
    }
    return sequence_.num_query_blocks - rows;
  }

  // Stores where the last tie that is kept ends. Threads have parts of the grid, one
  // after the other.
  PBS_DEVICE void FindEnd(const float* grid, const MassWithin& within) const {
    const int64_t count = sequence_.entries_per_head;
    const int64_t each = (count + kThreads - 1) / kThreads;
    const int64_t first = ThreadIndex() * each;
    const int64_t last = first + each < count ? first + each : count;
    auto* found = reinterpret_cast<int32_t*>(SharedMemory() +
                                             BlockValues<kThreads>::kSharedBytes);
    const auto is_tie = [&](int64_t at) {
      return FloatBits(LoadGlobal(grid + at)) == within.least;
    };
    int own = 0;
    for (int64_t at = first; at < last; ++at) own += is_tie(at) ? 1 : 0;
    StoreShared(found + ThreadIndex(), own);
    SyncThreads();
    int64_t left = within.ties;
    for (int i = 0; i < ThreadIndex(); ++i) left -= LoadShared(found + i);
    const bool is_last = ThreadIndex() == kThreads - 1;
    if (left <= 0 || (left > own && !is_last)) return;
    int64_t at = first;
    for (; at < last && left > 0; ++at) left -= is_tie(at) ? 1 : 0;
    StoreGlobal(target_, {begin_ + at, within.least, 0});
  }

  const SelectionParams& params_;
  const SequenceRecord sequence_;
  const bool by_grid_;
  const int64_t begin_;  // of the head's grid
  GridCut* const target_;
};

// Grid [num_heads, total_groups], 128 threads. Writes the lists.
class WriteLines {
 public:
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    WriteLines(params, PlaceInGrid(params.total_groups)).Run();
  }

 private:
  PBS_DEVICE WriteLines(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        head_(place.head),
        sequence_index_(FindSequence<&SequenceRecord::group_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        first_row_((place.item - sequence_.group_begin) * params.group_blocks),
        columns_(params.lines.kept + int64_t{2} * head_ * params.total_key_blocks +
                 sequence_.key_block_begin),
        distances_(columns_ + params.total_key_blocks) {}

  PBS_DEVICE void Run() const {
    if (sequence_.sparse == 0) return;
    const bool by_grid = SelectsByGrid(params_, head_, sequence_index_);
    GridCut cut = {0, 0xFFFFFFFFu, 0};
    if (by_grid) {
      cut = LoadGlobal(params_.lines.cuts + head_ * params_.num_sequences +
                       sequence_index_);
    }
    for (int i = ThreadIndex() / 32; i < params_.group_blocks; i += kThreads / 32) {
      const int row = first_row_ + i;
      if (row >= sequence_.num_query_blocks) return;
      WriteList(params_, sequence_, {head_, sequence_index_, row},
                [&](int block, bool is_earlier) {
                  return is_earlier && (KeepsLine(row, block) ||
                                        (by_grid && KeepsPlace(cut, row, block)));
                });
    }
  }

  PBS_DEVICE bool KeepsLine(int row, int block) const {
    const int distance = sequence_.first_query_block + row - block;
    return params_.lines.gamma >= 1 || LoadGlobal(columns_ + block) != 0 ||
           LoadGlobal(distances_ + distance) != 0;
  }

  PBS_DEVICE bool KeepsPlace(const GridCut& cut, int row, int block) const {
    const int64_t at =
        EntryOffset(sequence_, head_, row, params_.blocks_per_segment) + block;
    const uint32_t bits = FloatBits(LoadGlobal(params_.lines.grid + at));
    return bits > cut.least || (bits == cut.least && at < cut.end);
  }

  const SelectionParams& params_;
  const int head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int first_row_;             // query block, in the sequence
  const uint8_t* const columns_;    // block columns that the head keeps
  const uint8_t* const distances_;  // block distances
};

}  // namespace pbs::cuda
