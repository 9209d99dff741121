// What the scorers of stage 2 share. Each scorer has a file, cpu/select_*.cc.
//
// A scorer works on items: consecutive query blocks of one query head. For each query
// block it marks key blocks by its rule (methods/block_selection.h), and StoreList()
// makes the list.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/attention_run.h"
#include "methods/block_selection.h"

namespace pbs::cpu {

inline constexpr int32_t kPanelWidthMax = 64;  // of any table of kernels

struct SelectItem {
  int32_t member = 0;       // query head of the unit
  int32_t first_block = 0;  // of the sequence's query blocks
  int32_t num_blocks = 0;
};

// Memory of one item, in a worker's scratch. `Take` hands out parts of 4-byte words.
class ItemScratch {
 public:
  ItemScratch(const AttentionRun& run, int worker)
      : next_(static_cast<uint32_t*>(run.Scratch(worker))) {}

  float* Floats(int64_t count) { return reinterpret_cast<float*>(Words(count)); }
  uint32_t* Words(int64_t count) {
    uint32_t* begin = next_;
    next_ += RoundUp(count, kLanePad);
    return begin;
  }
  std::span<uint64_t> SortKeys(int64_t count) {
    return {reinterpret_cast<uint64_t*>(Words(2 * count)), static_cast<size_t>(count)};
  }
  std::span<uint8_t> Keep(int64_t count) {
    return {reinterpret_cast<uint8_t*>(Words(count / 4 + 1)),
            static_cast<size_t>(count)};
  }

 private:
  uint32_t* next_;
};

// Of the scorer of a method.
ScorerNeeds NeedsOf(const AttentionOptions& options);
// Words of scratch that an item of the sequence takes.
int64_t SelectWords(const CpuAttentionPlan& plan, const SequenceGeometry& s);

void SelectByMeans(AttentionRun& run, const Unit& unit, const SelectItem& item,
                   int worker);
void SelectByBands(AttentionRun& run, const Unit& unit, const SelectItem& item,
                   int worker);
void SelectByRows(AttentionRun& run, const Unit& unit, const SelectItem& item,
                  int worker);
void SelectByAntidiagonals(AttentionRun& run, const Unit& unit, const SelectItem& item,
                           int worker);
void SelectByLines(AttentionRun& run, const Unit& unit, const SelectItem& item,
                   int worker);
void SelectByVerticalSlash(AttentionRun& run, const Unit& unit, const SelectItem& item,
                           int worker);

int64_t MeansWords(const CpuAttentionPlan& plan, const SequenceGeometry& s);
int64_t BandsWords(const CpuAttentionPlan& plan, const SequenceGeometry& s);
int64_t RowsWords(const CpuAttentionPlan& plan, const SequenceGeometry& s);
int64_t AntidiagonalsWords(const CpuAttentionPlan& plan, const SequenceGeometry& s);
int64_t VerticalSlashWords(const CpuAttentionPlan& plan, const SequenceGeometry& s);
int64_t LinesWords(const CpuAttentionPlan& plan, const SequenceGeometry& s);

// The divisors of the logits of both bands, [2] per member. Needs the pooled queries
// and keys of the unit.
void MeasureBands(AttentionRun& run, const Unit& unit, int32_t member);

// Query rows of a query block, of the sequence's rows: [first, last).
struct RowRange {
  int32_t first = 0;
  int32_t last = 0;
};
RowRange RowsOfBlock(const AttentionRun& run, const Unit& unit, int32_t query_block);

// Key blocks that may be kept by their scores: [0, count).
int32_t NumCandidates(const AttentionRun& run, const Unit& unit, int32_t query_block);
// True when the query block reads every earlier block whatever the scores are.
bool IsDenseTail(const AttentionRun& run, const Unit& unit, int32_t member,
                 int32_t query_block);
// Key blocks, padded to whole vectors.
inline int32_t PaddedBlocks(const SequenceGeometry& s) {
  return static_cast<int32_t>(RoundUp(s.num_key_blocks, kLanePad));
}
// Raw products of rows of queries with the pooled keys.
//   queries [num_rows, head_dim]
//   products [num_rows, PaddedBlocks()]  out
void MultiplyMeans(const AttentionRun& run, const Unit& unit, const float* queries,
                   int32_t num_rows, float* products);
// Block means of the queries of one member, [query blocks, head_dim].
float* PooledQueries(const AttentionRun& run, const Unit& unit, int32_t member);
// The blocks that the query block reads whatever their scores are.
ForcedBlocks ForcedBlocksOf(const AttentionRun& run, const Unit& unit, int32_t member,
                            int32_t query_block);
// Adds the forced blocks, and stores the list.
void StoreList(AttentionRun& run, const Unit& unit, int32_t member, int32_t query_block,
               std::span<uint8_t> keep);

}  // namespace pbs::cpu
