// Keys and values of a block in slot order, and the means of blocks.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/block_rows.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/stamp_time.h"

namespace pbs::cuda {

// Grid [num_order_heads, total_key_blocks], 128 threads. Writes positions that were not
// sorted, copies keys and values to their slots (params.permutes), and writes the mean
// of the block's keys (params.pools).
template <class Element, int kHeadDim>
class GatherKeys {
 public:
  static constexpr int kThreads = 128;
  using Rows = BlockRows<Element, kHeadDim>;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    GatherKeys(params, PlaceInGrid(params.total_key_blocks)).Run();
  }

 private:
  PBS_DEVICE GatherKeys(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        block_(place.item),
        head_(place.head),
        sequence_index_(FindSequence<&SequenceRecord::key_block_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)) {}

  PBS_DEVICE void Run() {
    StoreShared(&positions()[ThreadIndex()], Position(ThreadIndex()));
    SyncThreads();
    if (params_.permutes != 0 && !IsSorted()) {
      StoreGlobal(params_.positions + FirstSlot() + ThreadIndex(),
                  LoadShared(&positions()[ThreadIndex()]));
    }
    if (params_.pools != 0 && LoadShared(&positions()[ThreadIndex()]) == 0) {
      StoreGlobal(params_.first_block + head_ * params_.num_sequences + sequence_index_,
                  block_ - sequence_.key_block_begin);
    }
    Keys();
    if (params_.permutes != 0) Values();
  }

  PBS_DEVICE void Keys() {
    const uint16_t* keys = HeadOf(params_.k);
    Rows rows;
    Rows::ForEachPiece(
        [&](int row) { return Source(keys, params_.k.strides.row, row); },
        [&](int row, int group, int piece, const Words4& values) {
          rows.Add(group, values);
          if (params_.permutes != 0) Store(params_.permuted_k, row, piece, values);
        });
    if (params_.pools == 0) return;
    rows.Mean(params_.block_rounding, [&](int column, float mean) {
      StoreGlobal(params_.pooled_keys +
                      (int64_t{head_} * kHeadDim + column) * params_.total_key_blocks +
                      block_,
                  params_.pools_by_length != 0 ? mean * WholeOverOwnLength() : mean);
    });
  }

  PBS_DEVICE void Values() {
    const uint16_t* values_of_head = HeadOf(params_.v);
    Rows::ForEachPiece(
        [&](int row) { return Source(values_of_head, params_.v.strides.row, row); },
        [&](int row, int, int piece, const Words4& values) {
          Store(params_.permuted_v, row, piece, values);
        });
  }

  PBS_DEVICE float WholeOverOwnLength() const {
    const int left =
        sequence_.k_len - (block_ - sequence_.key_block_begin) * kBlockTokens;
    return left < kBlockTokens ? kBlockTokens / static_cast<float>(left) : 1.0f;
  }

  // True when the positions of the block's slots are already sorted.
  PBS_DEVICE bool IsSorted() const {
    return block_ - sequence_.key_block_begin < sequence_.scored_blocks;
  }

  // Original position of a slot of the block; INT32_MAX after the last key.
  PBS_DEVICE int32_t Position(int row) const {
    const int slot = (block_ - sequence_.key_block_begin) * kBlockTokens + row;
    if (slot >= sequence_.k_len) return INT32_MAX;
    if (IsSorted()) {
      return LoadGlobal(params_.positions + FirstSlot() + row);
    }
    if (params_.given_order != nullptr && sequence_.sparse != 0) {
      return LoadGlobal(params_.given_order +
                        params_.given_order_strides.Offset(
                            sequence_index_, sequence_.k_begin, head_, slot));
    }
    return slot;
  }

  // Address of position 0 of the sequence in the head that is read.
  PBS_DEVICE const uint16_t* HeadOf(const RowOperand& operand) const {
    return operand.data + operand.strides.Offset(sequence_index_, sequence_.k_begin,
                                                 KvHeadOfOrder(params_, head_), 0);
  }
  PBS_DEVICE static const uint16_t* Source(const uint16_t* head, int64_t stride,
                                           int row) {
    const int32_t position = LoadShared(&positions()[row]);
    return position == INT32_MAX ? nullptr : head + position * stride;
  }

  PBS_DEVICE void Store(uint16_t* target, int row, int piece,
                        const Words4& values) const {
    StoreGlobal(
        reinterpret_cast<Words4*>(target + (FirstSlot() + row) * kHeadDim + piece * 8),
        values);
  }

  PBS_DEVICE int64_t FirstSlot() const {
    return (int64_t{head_} * params_.copied_blocks + block_) * kBlockTokens;
  }
  // Shared memory after that of the mean.
  PBS_DEVICE static int32_t* positions() {
    return reinterpret_cast<int32_t*>(SharedMemory() + Rows::kSharedBytes);
  }

  const SelectionParams& params_;
  const int block_;  // index over all sequences
  const int head_;   // order head
  const int sequence_index_;
  const SequenceRecord sequence_;
};

// Grid [total_query_blocks, num_heads], 128 threads. Computes the mean of each query
// block.
template <class Element, int kHeadDim>
struct PoolQueries {
  static constexpr int kThreads = 128;
  using Rows = BlockRows<Element, kHeadDim>;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    StampTime(params.ordered);
    const int item = BlockIndex() / params.num_heads;
    const int head = BlockIndex() % params.num_heads;
    const int index = FindSequence<&SequenceRecord::query_block_begin>(
        params.sequences, params.num_sequences, item);
    const SequenceRecord s = LoadGlobal(params.sequences + index);
    if (s.sparse == 0) return;
    const int block = s.first_query_block + item - s.query_block_begin;
    const int first = block * kBlockTokens - s.query_offset;  // may be negative
    const uint16_t* queries =
        params.q.data + params.q.strides.Offset(index, s.q_begin, head, 0);
    Rows rows;
    Rows::ForEachPiece(
        [&](int row) -> const uint16_t* {
          const int query = first + row;
          if (query < 0 || query >= s.q_len) return nullptr;
          return queries + query * params.q.strides.row;
        },
        [&](int, int group, int, const Words4& values) { rows.Add(group, values); });
    rows.Mean(ScoreRounding::kNone, [&](int column, float mean) {
      StoreGlobal(params.pooled_queries + int64_t{BlockIndex()} * kHeadDim + column,
                  mean);
    });
  }
};

}  // namespace pbs::cuda
