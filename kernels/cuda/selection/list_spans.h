// Makes the lists of minference: the blocks that the spans of chosen distances touch,
// those of write_list.h, and the gathered blocks of chosen columns (docs/KERNELS.md,
// "Columns and diagonals").
#pragma once

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/write_list.h"
#include "cuda/tiles/block_part.h"

namespace pbs::cuda {

// Grid [num_heads, total_query_blocks], 32 threads; dynamic shared memory:
// SpansSharedBytes(). Lane g < 2 makes the spans of group g.
class ListSpans {
 public:
  static constexpr int kThreads = 32;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    ListSpans(params, PlaceInGrid(params.total_query_blocks)).Run();
  }

 private:
  PBS_DEVICE ListSpans(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        parts_(reinterpret_cast<uint32_t*>(SharedMemory())),
        head_(place.head),
        sequence_index_(FindSequence<&SequenceRecord::query_block_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        query_block_(place.item - sequence_.query_block_begin),
        block_(sequence_.first_query_block + query_block_),
        own_begin_(OwnBegin(block_, params.blocks_per_segment)),
        own_end_(OwnEnd(block_, params.blocks_per_segment, sequence_.num_key_blocks)),
        entries_(
            EntryOffset(sequence_, head_, query_block_, params.blocks_per_segment)),
        distance_bits_(params.key_lines.distance_bits + Words()),
        lane_(ThreadIndex()) {}

  PBS_DEVICE void Run() {
    if (sequence_.sparse == 0) return;
    for (int i = lane_; i < kGroupsOfTile * own_end_; i += kThreads) {
      StoreShared(parts_ + i, uint32_t{kNoPart});
    }
    SyncThreads();
    int column_end = 0;  // of the lane's group
    if (lane_ < kGroupsOfTile && HasRows()) {
      column_end = (MarkSpans() + kBlockTokens - 1) / kBlockTokens;
    }
    SyncThreads();
    if (lane_ < kGroupsOfTile) {
      StoreGlobal(params_.key_lines.column_ends + Row() * kGroupsOfTile + lane_,
                  static_cast<uint16_t>(column_end));
    }
    for (int g = 0; g < kGroupsOfTile; ++g) {
      column_ends_[g] = Shuffle(column_end, g);
    }
    WriteBlocks();
    WriteGathered(column_end);
  }

  PBS_DEVICE int64_t Words() const {
    return (int64_t{head_} * params_.total_key_blocks + sequence_.key_block_begin) *
           (kBlockTokens / 32);
  }
  PBS_DEVICE int64_t Row() const {
    return ListRow(sequence_, params_.num_heads, head_, query_block_);
  }
  // First position of the lane's group, which may have no query.
  PBS_DEVICE int GroupBegin() const {
    return block_ * kBlockTokens + lane_ * kRowGroup;
  }
  PBS_DEVICE bool HasRows() const {
    return GroupBegin() + kRowGroup > sequence_.query_offset &&
           GroupBegin() < sequence_.k_len;
  }

  // Marks the spans of the lane's group. In the order of rising ends, an end that is
  // more than 64 keys behind the last span begins a span, and another end behind it
  // extends it by 64 keys. Returns the begin of the last span.
  PBS_DEVICE int MarkSpans() const {
    const int group_end = GroupBegin() + kRowGroup;
    int distance = ChosenUpTo(group_end - 1);
    int end = group_end - distance;
    if (end < kRowGroup) end = kRowGroup;
    int begin = end - kRowGroup;
    // The next distance ends behind the span.
    while ((distance = ChosenUpTo(group_end - end - 1)) >= 0) {
      const int next = group_end - distance;
      if (next > end + kRowGroup) {
        MarkSpan(begin, end);
        begin = next - kRowGroup;
        end = next;
      } else {
        end += kRowGroup;
      }
    }
    MarkSpan(begin, end);
    return begin;
  }

  // The largest chosen distance that is at most `distance`; below 0: none.
  PBS_DEVICE int ChosenUpTo(int distance) const {
    if (distance >= sequence_.k_len) distance = sequence_.k_len - 1;
    if (distance < 0) return -1;
    int word = distance / 32;
    uint32_t bits = LoadGlobal(distance_bits_ + word) & BitsBelow(distance % 32 + 1);
    while (bits == 0 && word > 0) bits = LoadGlobal(distance_bits_ + --word);
    return bits == 0 ? -1 : word * 32 + HighestBit(bits);
  }
  PBS_DEVICE static int HighestBit(uint32_t bits) {
    for (int shift = 1; shift < 32; shift *= 2) bits |= bits >> shift;
    return PopulationCount(bits) - 1;
  }

  PBS_DEVICE void MarkSpan(int begin, int end) const {
    for (int block = begin / kBlockTokens;
         block < own_end_ && block * kBlockTokens < end; ++block) {
      uint32_t* part = parts_ + lane_ * own_end_ + block;
      StoreShared(part, WithSpan(LoadShared(part), begin - block * kBlockTokens,
                                 end - block * kBlockTokens));
    }
  }

  PBS_DEVICE bool IsTouched(int block) const {
    return LoadShared(parts_ + block) != kNoPart ||
           LoadShared(parts_ + own_end_ + block) != kNoPart;
  }
  PBS_DEVICE bool IsWhole(int block) const {
    return block < params_.sink_blocks ||
           block >= WindowBegin(params_, sequence_, query_block_) ||
           (params_.own_has_mass == 0 && block >= own_begin_);
  }

  PBS_DEVICE void WriteBlocks() const {
    int count = 0;
    const uint32_t before = (1u << lane_) - 1;
    WriteList(params_, sequence_, {head_, sequence_index_, query_block_},
              [&](int block, bool is_earlier) {
                const bool keeps = is_earlier && (IsWhole(block) || IsTouched(block));
                const uint32_t kept = Ballot(keeps);
                if (keeps) WritePart(count + PopulationCount(kept & before), block);
                count += PopulationCount(kept);
                return keeps;
              });
    for (int block = own_begin_ + lane_; block < own_end_; block += kThreads) {
      WritePart(count + block - own_begin_, block);
    }
  }
  PBS_DEVICE void WritePart(int entry, int block) const {
    for (int g = 0; g < kGroupsOfTile; ++g) {
      uint32_t part =
          IsWhole(block) ? kWholePart : LoadShared(parts_ + g * own_end_ + block);
      if (block < column_ends_[g]) part |= kColumnsApart;
      StorePart(entry, g, part);
    }
  }
  PBS_DEVICE void StorePart(int entry, int g, uint32_t part) const {
    StoreGlobal(params_.key_lines.parts + (entries_ + entry) * kGroupsOfTile + g, part);
  }

  // Gathered blocks up to the last column that a group reads, in the entries before the
  // list's.
  PBS_DEVICE void WriteGathered(int column_end) const {
    const int columns =
        lane_ < kGroupsOfTile ? ColumnsBelow(column_end * kBlockTokens) : 0;
    const int a = Shuffle(columns, 0);
    const int b = Shuffle(columns, 1);
    const int count = ((a > b ? a : b) + kBlockTokens - 1) / kBlockTokens;
    const int first =
        GatheredBlock(params_, sequence_, head_) - sequence_.key_block_begin;
    for (int i = lane_; i < count; i += kThreads) {
      const int entry = i - count;
      StoreGlobal(params_.entries + entries_ + entry, static_cast<uint16_t>(first + i));
      StorePart(entry, 0, PrefixPart(a - i * kBlockTokens));
      StorePart(entry, 1, PrefixPart(b - i * kBlockTokens));
    }
    if (lane_ == 0) {
      StoreGlobal(params_.key_lines.gathered + Row(), static_cast<uint16_t>(count));
    }
  }
  // Chosen columns before slot `end`.
  PBS_DEVICE int ColumnsBelow(int end) const {
    const int32_t* chosen =
        params_.key_lines.chosen +
        (int64_t{head_} * params_.key_lines.total_gathered + sequence_.gathered_begin) *
            kBlockTokens;
    int low = 0;
    int high = NumColumns(params_.key_lines.vertical_tokens, sequence_.k_len);
    while (low < high) {
      const int middle = (low + high) / 2;
      if (LoadGlobal(chosen + middle) < end) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  const SelectionParams& params_;
  uint32_t* const parts_;  // [kGroupsOfTile, own_end_]
  const int head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int query_block_;  // of the sequence
  const int block_;        // absolute index
  const int own_begin_;
  const int own_end_;
  const int64_t entries_;  // of the list
  const uint32_t* const distance_bits_;
  const int lane_;
  int column_ends_[kGroupsOfTile] = {};
};

}  // namespace pbs::cuda
