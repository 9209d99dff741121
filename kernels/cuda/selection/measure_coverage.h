// Coverage of sampled rows: the share of their exact causal softmax that the executed
// blocks hold (docs/KERNELS.md, "Attention").
//
// A thread block has up to eight rows of one head and sequence, which share the reads
// of keys. Each thread scores every kThreads-th key with all rows and keeps a softmax
// per row over its keys. These are merged in a fixed order.
#pragma once

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"
#include "cuda/selection/coverage_params.h"
#include "cuda/selection/sequences.h"
#include "cuda/tiles/block_part.h"

namespace pbs::cuda {

// Sum of one row's softmax weights so far, relative to the largest score.
struct SeenMass {
  float max = -kInfinity;  // in base two
  float total = 0;
  float executed = 0;

  PBS_DEVICE void Add(float score, bool is_executed) {
    if (score > max) {
      Shrink(Exp2(max - score));
      max = score;
    }
    const float weight = Exp2(score - max);
    total += weight;
    if (is_executed) executed += weight;
  }
  PBS_DEVICE void Merge(SeenMass other) {
    const float top = Max(max, other.max);
    if (top == -kInfinity) return;  // neither sum has a key
    Shrink(Exp2(max - top));
    other.Shrink(Exp2(other.max - top));
    max = top;
    total += other.total;
    executed += other.executed;
  }

 private:
  PBS_DEVICE void Shrink(float factor) {
    total *= factor;
    executed *= factor;
  }
};

// Grid [num_heads, total_groups], 256 threads; dynamic shared memory: SharedBytes().
template <class Element, int kHeadDim>
class MeasureCoverage {
 public:
  static constexpr int kThreads = 256;

  // `longest` is the largest number of key blocks of a sequence.
  PBS_HOST_DEVICE static constexpr int SharedBytes(int longest) {
    return kRows * kHeadDim * 4 + kWarps * kRows * 12 + (longest + 7) / 8 * 8;
  }

  PBS_DEVICE static void Run(const CoverageParams& params) {
    MeasureCoverage(params, PlaceInGrid(params.total_groups)).Run();
  }

 private:
  static constexpr int kRows = kCoverageRowsTogether;
  static constexpr int kWarps = kThreads / 32;

  PBS_DEVICE MeasureCoverage(const CoverageParams& params, const GridPlace& place)
      : params_(params),
        head_(place.head),
        group_(place.item),
        sequence_index_(FindSequence<&SequenceRecord::coverage_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        first_((place.item - sequence_.coverage_begin) * kRows),
        sampled_(SampledRows(params.rows, sequence_.q_len)),
        rows_(sampled_ - first_ < kRows ? sampled_ - first_ : kRows),
        queries_(reinterpret_cast<float*>(SharedMemory())),
        masses_(queries_ + kRows * kHeadDim),
        executed_(reinterpret_cast<uint8_t*>(masses_ + kWarps * kRows * 3)) {}

  PBS_DEVICE void Run() {
    if (FellBack()) {
      if (ThreadIndex() < rows_) Store(ThreadIndex(), 1.0f);
      return;
    }
    if (params_.is_measured != 0) return;
    LoadQueries();
    MarkExecuted();
    SeenMass masses[kRows];
    ReadKeys(masses);
    Tell(masses);
  }

  PBS_DEVICE bool FellBack() const {
    if (params_.fell_back == nullptr) return false;
    const int order_head = head_ / (params_.num_heads / params_.num_order_heads);
    return LoadGlobal(params_.fell_back + order_head * params_.num_sequences +
                      sequence_index_) != 0;
  }

  // Query row in the sequence.
  PBS_DEVICE int QueryRow(int row) const {
    return SampledRow(first_ + row, sampled_, sequence_.q_len);
  }
  // Position of a row. It is negative where there is no row, so that nothing is seen.
  PBS_DEVICE int Position(int row) const {
    return row < rows_ ? sequence_.query_offset + QueryRow(row) : -1;
  }
  PBS_DEVICE int QueryBlock(int row) const { return Position(row) / kBlockTokens; }
  PBS_DEVICE int NumBlocks() const {
    return OwnEnd(QueryBlock(rows_ - 1), params_.blocks_per_segment,
                  sequence_.num_key_blocks);
  }

  PBS_DEVICE void LoadQueries() {
    for (int i = ThreadIndex(); i < kRows * kHeadDim; i += kThreads) {
      const int row = i / kHeadDim;
      float value = 0;
      if (row < rows_) {
        value = Element::Low(
            LoadGlobal(params_.q.data +
                       params_.q.strides.Offset(sequence_index_, sequence_.q_begin,
                                                head_, QueryRow(row)) +
                       i % kHeadDim));
      }
      StoreShared(queries_ + i, value);
    }
  }

  // The list of a row.
  PBS_DEVICE int64_t ListOf(int row) const {
    return ListRow(sequence_, params_.num_heads, head_,
                   QueryBlock(row) - sequence_.first_query_block);
  }
  PBS_DEVICE int64_t EntriesOf(int row) const {
    return EntryOffset(sequence_, head_, QueryBlock(row) - sequence_.first_query_block,
                       params_.blocks_per_segment);
  }

  // Sets bit r of a block's byte when row r reads the block.
  PBS_DEVICE void MarkExecuted() {
    for (int block = ThreadIndex(); block < NumBlocks(); block += kThreads) {
      StoreShared(executed_ + block, uint8_t{0});
    }
    for (int row = 0; row < rows_; ++row) {
      SyncThreads();  // rows have blocks in common
      const int count = LoadGlobal(params_.counts + ListOf(row));
      const uint16_t* list = params_.entries + EntriesOf(row);
      for (int i = ThreadIndex(); i < count; i += kThreads) {
        uint8_t* bits = executed_ + LoadGlobal(list + i);
        StoreShared(bits, static_cast<uint8_t>(LoadShared(bits) | 1 << row));
      }
    }
    SyncThreads();
  }

  PBS_DEVICE void ReadKeys(SeenMass (&masses)[kRows]) const {
    const int read_head = head_ / (params_.num_heads / params_.num_read_heads);
    const bool permuted = params_.positions != nullptr;
    const int first_slot =
        permuted ? sequence_.key_block_begin * kBlockTokens : sequence_.k_begin;
    const uint16_t* keys =
        params_.k.data +
        params_.k.strides.Offset(sequence_index_, first_slot, read_head, 0);
    const int32_t* positions =
        permuted ? params_.positions + read_head * params_.position_stride + first_slot
                 : nullptr;
    int seen_up_to[kRows];
    PBS_UNROLL
    for (int row = 0; row < kRows; ++row) seen_up_to[row] = Position(row);
    const int last = Position(rows_ - 1);
    const int slots = permuted ? NumBlocks() * kBlockTokens : last + 1;
    PBS_NO_UNROLL
    for (int slot = ThreadIndex(); slot < slots; slot += kThreads) {
      const int position = permuted ? LoadGlobal(positions + slot) : slot;
      if (position > last) continue;
      float scores[kRows] = {};
      Score(keys + slot * params_.k.strides.row, scores);
      int executed = LoadShared(executed_ + slot / kBlockTokens);
      if (params_.parts != nullptr) executed = ReadInPart(slot, executed);
      PBS_UNROLL
      for (int row = 0; row < kRows; ++row) {
        if (position > seen_up_to[row]) continue;
        masses[row].Add(scores[row] * params_.scale_log2, (executed >> row & 1) != 0);
      }
    }
  }

  // The rows that read a key in the part of a block of their list, or as a column.
  // `listed`: those whose list has the key's block.
  PBS_DEVICE int ReadInPart(int slot, int listed) const {
    const int block = slot / kBlockTokens;
    const uint32_t columns =
        LoadGlobal(params_.column_bits + head_ * params_.column_stride +
                   sequence_.key_block_begin * (kBlockTokens / 32) + slot / 32);
    const bool is_column = (columns >> slot % 32 & 1) != 0;
    int rows = 0;
    for (int row = 0; row < rows_; ++row) {
      const int group = Position(row) / kRowGroup % kGroupsOfTile;
      bool reads = is_column && block < LoadGlobal(params_.column_ends +
                                                   ListOf(row) * kGroupsOfTile + group);
      if (!reads && (listed >> row & 1) != 0) {
        const uint32_t part =
            LoadGlobal(params_.parts +
                       (EntriesOf(row) + EntryOf(row, block)) * kGroupsOfTile + group);
        reads = (PartWord(part, slot % kBlockTokens / 32) >> slot % 32 & 1) != 0;
      }
      rows |= (reads ? 1 : 0) << row;
    }
    return rows;
  }
  // Index of a block in the list of a row, which has it.
  PBS_DEVICE int EntryOf(int row, int block) const {
    const uint16_t* list = params_.entries + EntriesOf(row);
    int low = 0;
    int high = LoadGlobal(params_.counts + ListOf(row)) - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (LoadGlobal(list + middle) < block) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Scores of a key with all rows.
  PBS_DEVICE void Score(const uint16_t* key, float (&scores)[kRows]) const {
    PBS_NO_UNROLL
    for (int column = 0; column < kHeadDim; column += 8) {
      const Words4 words = LoadGlobal(reinterpret_cast<const Words4*>(key + column));
      PBS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float x[4] = {Element::Low(words.words[2 * half]),
                            Element::High(words.words[2 * half]),
                            Element::Low(words.words[2 * half + 1]),
                            Element::High(words.words[2 * half + 1])};
        PBS_UNROLL
        for (int row = 0; row < kRows; ++row) {
          const Words4 q = LoadShared(reinterpret_cast<const Words4*>(
              queries_ + row * kHeadDim + column + 4 * half));
          PBS_UNROLL
          for (int i = 0; i < 4; ++i) scores[row] += BitsToFloat(q.words[i]) * x[i];
        }
      }
    }
  }

  // Merges the masses of lanes, then of warps, in rising order.
  PBS_DEVICE void Tell(SeenMass (&masses)[kRows]) {
    PBS_UNROLL
    for (int row = 0; row < kRows; ++row) {
      PBS_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) {
        SeenMass& own = masses[row];
        own.Merge({ShuffleXor(own.max, mask), ShuffleXor(own.total, mask),
                   ShuffleXor(own.executed, mask)});
      }
      if (ThreadIndex() % 32 != 0) continue;
      float* at = masses_ + (ThreadIndex() / 32 * kRows + row) * 3;
      StoreShared(at, masses[row].max);
      StoreShared(at + 1, masses[row].total);
      StoreShared(at + 2, masses[row].executed);
    }
    SyncThreads();
    if (ThreadIndex() >= rows_) return;
    SeenMass all;
    for (int warp = 0; warp < kWarps; ++warp) {
      const float* at = masses_ + (warp * kRows + ThreadIndex()) * 3;
      all.Merge({LoadShared(at), LoadShared(at + 1), LoadShared(at + 2)});
    }
    Store(ThreadIndex(), all.executed / all.total);
  }

  PBS_DEVICE void Store(int row, float coverage) const {
    StoreGlobal(params_.coverage +
                    (int64_t{head_} * params_.total_groups + group_) * kRows + row,
                coverage);
  }

  const CoverageParams& params_;
  const int head_;
  const int group_;  // of all sequences
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int first_;          // first sampled row, in the sequence
  const int sampled_;        // sampled rows of the sequence
  const int rows_;           // rows of this thread block
  float* const queries_;     // [kRows, kHeadDim]
  float* const masses_;      // [kWarps, kRows, 3]
  uint8_t* const executed_;  // [key blocks]
};

}  // namespace pbs::cuda
