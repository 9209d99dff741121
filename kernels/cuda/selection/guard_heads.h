// The guard of coverage_min: a query head of a sequence whose sampled rows keep less
// than this share of their attention mass on average reads every block instead.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/coverage_params.h"
#include "cuda/selection/sequences.h"
#include "cuda/tiles/warp_sums.h"

namespace pbs::cuda {

// Grid [num_heads, num_sequences], 128 threads. Needs the coverage of the lists
// (measure_coverage.h). Of a guarded head it rewrites the lists, to every block up to
// the end of each query block's own segment, and the coverage, to 1.
class GuardHeads {
 public:
  static constexpr int kThreads = 128;
  static constexpr int kSharedBytes = 4;  // whether the head is guarded

  PBS_DEVICE static void Run(const GuardParams& params) {
    const CoverageParams& c = params.coverage;
    const GridPlace place = PlaceInGrid(c.num_sequences);
    const SequenceRecord s = LoadGlobal(c.sequences + place.item);
    float* coverage =
        c.coverage + (int64_t{place.head} * c.total_groups + s.coverage_begin) *
                         kCoverageRowsTogether;
    const int rows = SampledRows(c.rows, s.q_len);
    auto* told = reinterpret_cast<int32_t*>(SharedMemory());
    if (ThreadIndex() < 32) {
      const bool guarded = s.sparse != 0 && !KeepsEnough(params.least, coverage, rows);
      if (ThreadIndex() == 0) {
        StoreShared(told, guarded ? 1 : 0);
        StoreGlobal(params.guarded + place.head * c.num_sequences + place.item,
                    guarded ? 1 : 0);
      }
    }
    SyncThreads();
    if (LoadShared(told) == 0) return;
    for (int i = ThreadIndex(); i < rows; i += kThreads) {
      StoreGlobal(coverage + i, 1.0f);
    }
    for (int i = ThreadIndex() / 32; i < s.num_query_blocks; i += kThreads / 32) {
      ListEveryBlock(params, s, place.head, i);
    }
  }

 private:
  // One warp calls.
  PBS_DEVICE static bool KeepsEnough(float least, const float* coverage, int rows) {
    double sum = 0;
    for (int i = ThreadIndex() % 32; i < rows; i += 32) sum += LoadGlobal(coverage + i);
    return SumOfWarp(sum) >= static_cast<double>(least) * rows;
  }

  PBS_DEVICE static void ListEveryBlock(const GuardParams& params,
                                        const SequenceRecord& s, int head,
                                        int query_block) {
    const CoverageParams& c = params.coverage;
    const int end = OwnEnd(s.first_query_block + query_block, c.blocks_per_segment,
                           s.num_key_blocks);
    uint16_t* list =
        params.entries + EntryOffset(s, head, query_block, c.blocks_per_segment);
    for (int block = ThreadIndex() % 32; block < end; block += 32) {
      StoreGlobal(list + block, static_cast<uint16_t>(block));
    }
    if (ThreadIndex() % 32 == 0) {
      StoreGlobal(params.counts + ListRow(s, c.num_heads, head, query_block),
                  static_cast<uint16_t>(end));
    }
  }
};

}  // namespace pbs::cuda
