#include "tests/bench/forced_lists.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace pbs::bench {
namespace {

// The fraction of past blocks that brings one head of one sequence to `density`.
double PastFraction(const AttentionGeometry& g, const SequenceGeometry& s,
                    double density) {
  double causal = 0;
  double own = 0;
  double past = 0;
  for (int32_t i = 0; i < s.num_query_blocks; ++i) {
    const int32_t block = s.first_query_block + i;
    const int32_t own_begin = block / g.blocks_per_segment * g.blocks_per_segment;
    causal += block + 1;
    own += g.RowCapacity(s, block) - own_begin;
    past += own_begin;
  }
  return past == 0 ? 0.0 : std::clamp((density * causal - own) / past, 0.0, 1.0);
}

}  // namespace

BlockLists ForcedLists(const AttentionGeometry& geometry, double density) {
  BlockLists lists;
  std::minstd_rand random(1);
  for (const SequenceGeometry& s : geometry.sequences) {
    const double fraction = PastFraction(geometry, s, density);
    for (int32_t head = 0; head < geometry.num_heads; ++head) {
      double owed = 0;  // what rounding kept from earlier rows
      for (int32_t i = 0; i < s.num_query_blocks; ++i) {
        const int32_t block = s.first_query_block + i;
        const int32_t own =
            block / geometry.blocks_per_segment * geometry.blocks_per_segment;
        owed += fraction * own;
        const auto take = std::min(static_cast<int32_t>(std::lround(owed)), own);
        owed -= take;
        std::vector<uint16_t> past(static_cast<size_t>(own));
        std::iota(past.begin(), past.end(), uint16_t{0});
        // Block 0 stays in front: it is taken whenever any block is.
        if (own > 1) std::shuffle(past.begin() + 1, past.end(), random);
        std::sort(past.begin(), past.begin() + take);
        lists.begin.push_back(static_cast<int64_t>(lists.indices.size()));
        lists.indices.insert(lists.indices.end(), past.begin(), past.begin() + take);
        for (int32_t j = own; j < geometry.RowCapacity(s, block); ++j) {
          lists.indices.push_back(static_cast<uint16_t>(j));
        }
        lists.count.push_back(static_cast<uint16_t>(
            static_cast<int64_t>(lists.indices.size()) - lists.begin.back()));
        lists.num_masked.push_back(
            static_cast<uint16_t>(geometry.RowCapacity(s, block) - own));
      }
    }
  }
  return lists;
}

}  // namespace pbs::bench
