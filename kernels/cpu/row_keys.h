// The keys that a query tile reads when it reads parts of blocks (minference): spans of
// keys, and the chosen columns outside of them.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/attention_run.h"
#include "methods/vertical_slash.h"

namespace pbs::cpu {

class RowKeys {
 public:
  RowKeys() = default;
  // The keys of the tile of `head` that begins at query `position`. `memory`:
  // SlotWords() words of this tile. `mask`: [block_size], shared by tiles.
  RowKeys(const AttentionRun& run, const Unit& unit, int32_t head, int32_t position,
          uint32_t* memory, int32_t* mask);
  // Words of all tiles of a group, and of their mask.
  static int64_t Words(const CpuAttentionPlan& plan, const SequenceGeometry& s);
  static int64_t SlotWords(const SequenceGeometry& s);

  // True when every key of a listed block is read.
  bool HoldsBlock(int32_t block) const;
  // Positions of the keys of a listed block, INT32_MAX for those that are not read.
  // Valid until the next call for any tile.
  const int32_t* BlockPositions(int32_t block) const;
  // The same of a gathered block of columns; null when none is read.
  const int32_t* ColumnPositions(int32_t gathered_block) const;

  bool Reads(int32_t slot) const;  // in any way
  std::span<const int32_t> columns() const { return columns_; }
  bool ReadsColumn(int32_t slot) const;  // as a column

 private:
  bool ReadsInSpan(int32_t slot) const;
  bool ReadsWholeBlock(int32_t block) const;
  // The first span that ends behind `slot`.
  std::span<const KeySpan>::iterator SpanAt(int32_t slot) const;

  const int32_t* positions_ = nullptr;
  std::span<const int32_t> columns_;
  std::span<const KeySpan> spans_;
  int32_t* mask_ = nullptr;
  int32_t block_size_ = 0;
  int32_t num_key_blocks_ = 0;
  // Blocks that are read whole: [0, sink_end) and [window_begin, num_key_blocks).
  int32_t sink_end_ = 0;
  int32_t window_begin_ = 0;
};

}  // namespace pbs::cpu
