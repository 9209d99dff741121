// State of one Run() of the CPU backend, with typed access to the workspace. Its stages
// share it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cpu/attention_plan.h"
#include "cpu/thread_pool.h"

namespace pbs::cpu {

struct AttentionRun {
  const CpuAttentionPlan& plan;
  const AttentionTensors& tensors;
  std::byte* workspace;
  const TileKernels& kernels;
  ThreadPool& pool;
  const std::atomic<bool>* stop;
  std::atomic<bool> non_finite{false};

  template <class T>
  T* At(int64_t offset) const {
    return reinterpret_cast<T*>(workspace + offset);
  }
  bool Stopped() const {
    return stop != nullptr && stop->load(std::memory_order_relaxed);
  }
  void* Scratch(int worker) const {
    return At<void*>(plan.scratch_at + worker * plan.scratch_bytes);
  }

  const SequenceGeometry& Sequence(const Unit& unit) const {
    return plan.geometry.sequences[unit.sequence];
  }
  int64_t UnitIndex(const Unit& unit) const { return &unit - plan.units.data(); }
  int32_t QueryHead(const Unit& unit, int32_t member) const {
    return unit.order_head * plan.num_members + member;
  }
  int32_t KvHead(const Unit& unit) const {
    return plan.geometry.KvHead(QueryHead(unit, 0));
  }

  // Original positions of the unit's slots; INT32_MAX in the padding of a short block.
  int32_t* Positions(const Unit& unit) const {
    return At<int32_t>(plan.positions_at) +
           unit.order_head * plan.geometry.total_slots + Sequence(unit).slot_begin;
  }
  // Smallest and largest position of each block, without padding.
  int32_t* BlockRange(const Unit& unit) const {
    const AttentionGeometry& g = plan.geometry;
    return At<int32_t>(plan.block_range_at) +
           2 * ((unit.order_head * g.total_slots + Sequence(unit).slot_begin) /
                g.block_size);
  }
  int32_t& FirstBlock(const Unit& unit) const {
    return At<int32_t>(plan.first_block_at)[UnitIndex(unit)];
  }
  uint8_t& RanDense(const Unit& unit) const {
    return At<uint8_t>(plan.unit_dense_at)[UnitIndex(unit)];
  }

  // 1: the query head reads every block because of coverage_min.
  uint8_t& Guarded(const Unit& unit, int32_t head) const {
    return At<uint8_t>(
        plan.guarded_at)[int64_t{unit.sequence} * plan.geometry.num_heads + head];
  }

  uint32_t* PackedKeys(const Unit& unit) const {
    return At<uint32_t>(plan.packed_at) + unit.packed_begin;
  }
  uint32_t* PackedValues(const Unit& unit) const {
    return PackedKeys(unit) + plan.PackedWords(Sequence(unit));
  }
  int64_t BlockWords() const {
    return static_cast<int64_t>(plan.geometry.block_size) * plan.depth;
  }
  float* Scoring(const Unit& unit) const {
    return At<float>(plan.scoring_at) + unit.score_begin;
  }
  float* Pooled(const Unit& unit) const {
    return At<float>(plan.pooled_at) + unit.pooled_begin;
  }

  // The lines of a query head, and the packed keys and values of its columns.
  std::span<int32_t> ChosenColumns(const Unit& unit, int32_t head) const {
    return {
        At<int32_t>(plan.lines_at) + plan.ColumnsAt(unit, head - QueryHead(unit, 0)),
        static_cast<size_t>(plan.Columns(Sequence(unit)))};
  }
  std::span<int32_t> ChosenDistances(const Unit& unit, int32_t head) const {
    return {
        At<int32_t>(plan.lines_at) + plan.DistancesAt(unit, head - QueryHead(unit, 0)),
        static_cast<size_t>(plan.Distances(Sequence(unit)))};
  }
  uint32_t* GatheredKeys(const Unit& unit, int32_t member) const {
    const SequenceGeometry& s = Sequence(unit);
    return reinterpret_cast<uint32_t*>(Pooled(unit) + plan.Pooled(s).columns) +
           int64_t{2} * member * plan.GatheredBlocks(s) * BlockWords();
  }
  uint32_t* GatheredValues(const Unit& unit, int32_t member) const {
    return GatheredKeys(unit, member) +
           plan.GatheredBlocks(Sequence(unit)) * BlockWords();
  }

  // Means of the unit's key blocks and value blocks: rows, and packed like keys and
  // values, [MeanBlocks()] blocks.
  float* MeanKeyRows(const Unit& unit) const {
    return At<float>(plan.means_at) + unit.means_begin;
  }
  float* MeanValueRows(const Unit& unit) const {
    return MeanKeyRows(unit) + MeanRowsFloats(unit);
  }
  uint32_t* MeanKeys(const Unit& unit) const {
    return reinterpret_cast<uint32_t*>(MeanValueRows(unit) + MeanRowsFloats(unit));
  }
  uint32_t* MeanValues(const Unit& unit) const {
    return MeanKeys(unit) + plan.MeanBlocks(Sequence(unit)) * BlockWords();
  }
  int64_t MeanRowsFloats(const Unit& unit) const {
    return int64_t{plan.MeanBlocks(Sequence(unit))} * plan.geometry.block_size *
           plan.geometry.head_dim;
  }

  // Length of the list of (query head, query block of the sequence), when blocks are
  // selected.
  uint16_t& ListCount(const Unit& unit, int32_t head, int32_t query_block) const {
    return At<uint16_t>(
        plan.counts_at)[plan.geometry.ListRow(unit.sequence, head, query_block)];
  }
  uint16_t* ListEntries(const Unit& unit, int32_t head, int32_t query_block) const {
    const SequenceGeometry& s = Sequence(unit);
    return At<uint16_t>(plan.entries_at) + s.entries_begin + head * s.entries_per_head +
           plan.row_entries[s.query_block_begin + query_block];
  }
  std::span<const uint16_t> List(const Unit& unit, int32_t head,
                                 int32_t query_block) const {
    return {ListEntries(unit, head, query_block), ListCount(unit, head, query_block)};
  }

  const std::byte* Row(const ConstRows& rows, const Unit& unit, int64_t before,
                       int32_t head, int32_t row) const {
    return static_cast<const std::byte*>(rows.data) +
           rows.layout.Offset(unit.sequence, before, head, row) *
               DTypeBytes(plan.problem.dtype);
  }
  // Attention mass to keep, of methods with a threshold.
  float Threshold(const Unit& unit, int32_t member) const {
    return tensors.head_thresholds.empty()
               ? plan.problem.options.threshold
               : tensors.head_thresholds[QueryHead(unit, member)];
  }
  // Whatever the inputs are.
  bool ReadsEveryBlock(const Unit& unit, int32_t member) const {
    return tensors.head_thresholds.empty() ? SelectsEveryBlock(plan.problem.options)
                                           : Threshold(unit, member) >= 1;
  }
  const std::byte* QueryRow(const Unit& unit, int32_t head, int32_t row) const {
    return Row(tensors.q, unit, Sequence(unit).q_begin, head, row);
  }

  // Calls body(unit, index within the unit, worker) over a prefix of the wave.
  template <class Body>
  void ForEach(const Wave& wave, const std::vector<int64_t>& prefix, Body&& body) {
    pool.ParallelFor(prefix.back(), [&](int64_t index, int worker) {
      const auto next = std::upper_bound(prefix.begin(), prefix.end(), index);
      const auto local = static_cast<int32_t>(next - prefix.begin()) - 1;
      body(plan.units[wave.first_unit + local], index - prefix[local], worker);
    });
  }
};

// The stages, in order. Each covers every unit of the wave.
void ScoreAndSortKeys(AttentionRun& run, const Wave& wave);  // positions of the slots
void PackOperands(AttentionRun& run, const Wave& wave);      // packed K and V, pooled K
void SelectBlocks(AttentionRun& run, const Wave& wave);      // lists
void GuardCoverage(AttentionRun& run, const Wave& wave);  // where lists keep too little
void FallBackToDense(AttentionRun& run, const Wave& wave);  // where lists do not pay
void PackMeans(AttentionRun& run, const Wave& wave);        // packed means of blocks
void Attend(AttentionRun& run, const Wave& wave);           // o, lse
void MeasureCoverage(AttentionRun& run, const Wave& wave);

// Ratio of executed to causal blocks of the unit's selected lists.
double UnitCausalRatio(const AttentionRun& run, const Unit& unit);

// Sum of rows of words over `divisor`, [head_dim]; rounded to the input dtype where the
// published code rounds.
void MeanOfRows(const AttentionRun& run, const uint32_t* rows, int32_t num_rows,
                int32_t divisor, float* mean);

// Packs gathered rows of values, [block_size, depth] words.
void PackValues(const AttentionRun& run, const uint32_t* rows, uint32_t* values);

// Fills `report` from the workspace of a finished run.
void FillReport(const CpuAttentionPlan& plan, const std::byte* workspace,
                const ReportRequest& request, AttentionReport* report);

}  // namespace pbs::cpu
