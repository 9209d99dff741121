// Chooses key columns and distances by the attention of the last queries, and gathers
// the keys and values of the columns (minference, arXiv 2407.02490). The lists name the
// blocks that the spans of a query block touch; cpu/row_keys.h has the keys in them.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/line_masses.h"
#include "methods/vertical_slash.h"

namespace pbs::cpu {
namespace {

constexpr int32_t kPublishedWidth = 128;  // head dim of the published scale

// Packs the chosen columns of a head like blocks of keys and values.
void GatherColumns(AttentionRun& run, const Unit& unit, int32_t member,
                   std::span<const int32_t> columns, uint32_t* rows) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t block_size = plan.geometry.block_size;
  const int32_t* positions = run.Positions(unit);
  for (int32_t block = 0; block < plan.GatheredBlocks(s); ++block) {
    const auto first = static_cast<size_t>(block) * block_size;
    const auto count =
        std::min(columns.size() - first, static_cast<size_t>(block_size));
    const auto load = [&](const ConstRows& source) {
      for (size_t i = 0; i < count; ++i) {
        RowToWords(run.kernels, plan.format,
                   run.Row(source, unit, s.k_begin, run.KvHead(unit),
                           positions[columns[first + i]]),
                   plan.geometry.head_dim, rows + static_cast<int64_t>(i) * plan.depth);
      }
      std::fill(rows + static_cast<int64_t>(count) * plan.depth,
                rows + run.BlockWords(), 0u);
    };
    load(run.tensors.k);
    PackTransposed(run.kernels, rows, block_size, plan.depth,
                   run.GatheredKeys(unit, member) + block * run.BlockWords());
    load(run.tensors.v);
    PackValues(run, rows, run.GatheredValues(unit, member) + block * run.BlockWords());
  }
}

// Marks the blocks before the end of the query block that the spans of its rows touch.
void KeepSpans(const AttentionRun& run, const Unit& unit, int32_t query_block,
               std::span<const int32_t> distances, KeySpan* spans,
               std::span<uint8_t> keep) {
  const int32_t block_size = run.plan.geometry.block_size;
  const RowRange rows = RowsOfBlock(run, unit, query_block);
  const int32_t offset = run.Sequence(unit).query_offset;
  std::fill(keep.begin(), keep.end(), uint8_t{0});
  int32_t position = offset + rows.first;
  while (position < offset + rows.last) {
    const int32_t count = MakeSpans(distances, position, spans);
    for (int32_t i = 0; i < count; ++i) {
      const auto end = std::min<int64_t>(
          spans[i].end, static_cast<int64_t>(keep.size()) * block_size);
      for (int64_t at = spans[i].begin; at < end;
           at = (at / block_size + 1) * block_size) {
        keep[static_cast<size_t>(at / block_size)] = 1;
      }
    }
    position = (position / kRowGroup + 1) * kRowGroup;
  }
}

}  // namespace

int64_t VerticalSlashWords(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  const int64_t lines =
      LineMasses::Words(plan, s, kLineQueries) + 2 * RoundUp(s.k_len, kLanePad);
  const int64_t gathering = int64_t{plan.geometry.block_size} * plan.depth;
  return lines + gathering + RoundUp(2 * SpansMax(s.k_len), kLanePad) +
         RoundUp(s.num_key_blocks / 4 + 1, kLanePad);
}

void SelectByVerticalSlash(AttentionRun& run, const Unit& unit, const SelectItem& item,
                           int worker) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  ItemScratch scratch(run, worker);
  LineMasses masses(run, unit, kLineQueries, scratch);
  const std::span<uint64_t> sort_keys = scratch.SortKeys(s.k_len);
  uint32_t* rows = scratch.Words(int64_t{plan.geometry.block_size} * plan.depth);
  auto* spans = reinterpret_cast<KeySpan*>(scratch.Words(2 * SpansMax(s.k_len)));
  const std::span<uint8_t> keep = scratch.Keep(s.num_key_blocks);
  const int32_t width =
      plan.problem.options.as_published ? kPublishedWidth : plan.geometry.head_dim;
  if (!masses.Measure(item.member, width)) {
    run.non_finite = true;
    return;
  }
  const int32_t head = run.QueryHead(unit, item.member);
  const std::span<int32_t> columns = run.ChosenColumns(unit, head);
  const std::span<int32_t> distances = run.ChosenDistances(unit, head);
  const auto keys = static_cast<size_t>(s.k_len);
  ChooseLines({masses.columns(), keys}, {masses.distances(), keys}, sort_keys, columns,
              distances);
  GatherColumns(run, unit, item.member, columns, rows);
  for (int32_t i = 0; i < s.num_query_blocks; ++i) {
    KeepSpans(run, unit, i, distances, spans, keep);
    StoreList(run, unit, item.member, i, keep);
  }
}

}  // namespace pbs::cpu
