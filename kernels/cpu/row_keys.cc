#include "cpu/row_keys.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/attention_select.h"

namespace pbs::cpu {

RowKeys::RowKeys(const AttentionRun& run, const Unit& unit, int32_t head,
                 int32_t position, uint32_t* memory, int32_t* mask)
    : positions_(run.Positions(unit)),
      columns_(run.ChosenColumns(unit, head)),
      mask_(mask),
      block_size_(run.plan.geometry.block_size),
      num_key_blocks_(run.Sequence(unit).num_key_blocks) {
  auto* spans = reinterpret_cast<KeySpan*>(memory);
  const int32_t count = MakeSpans(run.ChosenDistances(unit, head), position, spans);
  spans_ = {spans, static_cast<size_t>(count)};
  const SequenceGeometry& s = run.Sequence(unit);
  const ForcedBlocks forced =
      ForcedBlocksOf(run, unit, head - run.QueryHead(unit, 0),
                     position / block_size_ - s.first_query_block);
  sink_end_ = forced.sink_end;
  window_begin_ = Permutes(run.plan.problem.options)
                      ? std::min(forced.window_begin, forced.own_begin)
                      : forced.window_begin;
}

int64_t RowKeys::SlotWords(const SequenceGeometry& s) {
  static_assert(sizeof(KeySpan) == 8);
  return int64_t{2} * SpansMax(s.k_len);
}

int64_t RowKeys::Words(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  return kSharedTiles * SlotWords(s) + plan.geometry.block_size;
}

bool RowKeys::ReadsWholeBlock(int32_t block) const {
  return block < sink_end_ || block >= window_begin_;
}

std::span<const KeySpan>::iterator RowKeys::SpanAt(int32_t slot) const {
  return std::upper_bound(
      spans_.begin(), spans_.end(), slot,
      [](int32_t at, const KeySpan& span) { return at < span.end; });
}

bool RowKeys::ReadsInSpan(int32_t slot) const {
  const auto span = SpanAt(slot);
  return span != spans_.end() && span->begin <= slot;
}

bool RowKeys::ReadsColumn(int32_t slot) const {
  return slot < spans_.back().begin && !ReadsInSpan(slot) &&
         !ReadsWholeBlock(slot / block_size_);
}

bool RowKeys::Reads(int32_t slot) const {
  return ReadsInSpan(slot) || ReadsWholeBlock(slot / block_size_) ||
         (std::binary_search(columns_.begin(), columns_.end(), slot) &&
          ReadsColumn(slot));
}

bool RowKeys::HoldsBlock(int32_t block) const {
  if (ReadsWholeBlock(block)) return true;
  const int32_t begin = block * block_size_;
  const auto span = SpanAt(begin);
  return span != spans_.end() && span->begin <= begin &&
         span->end >= begin + block_size_;
}

const int32_t* RowKeys::BlockPositions(int32_t block) const {
  const int32_t begin = block * block_size_;
  std::fill_n(mask_, block_size_, INT32_MAX);
  auto span = SpanAt(begin);
  for (; span != spans_.end() && span->begin < begin + block_size_; ++span) {
    const int32_t first = std::max(span->begin, begin);
    const int32_t last = std::min(span->end, begin + block_size_);
    std::copy(positions_ + first, positions_ + last, mask_ + (first - begin));
  }
  return mask_;
}

const int32_t* RowKeys::ColumnPositions(int32_t gathered_block) const {
  const auto first = static_cast<size_t>(gathered_block) * block_size_;
  const auto count =
      std::min(columns_.size() - first, static_cast<size_t>(block_size_));
  if (columns_[first] >= spans_.back().begin) return nullptr;  // nor any behind it
  std::fill_n(mask_, block_size_, INT32_MAX);
  bool any = false;
  for (size_t i = 0; i < count; ++i) {
    const int32_t slot = columns_[first + i];
    if (!ReadsColumn(slot)) continue;
    mask_[i] = positions_[slot];
    any = true;
  }
  return any ? mask_ : nullptr;
}

}  // namespace pbs::cpu
