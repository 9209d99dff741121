// Scores of sampled antidiagonals (xattention): the attention between groups of
// `stride` queries and groups of `stride` keys, summed over the groups of a block.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/reference_rules.h"
#include "reference/reference_select.h"

namespace pbs::reference {
namespace {

// Sum of the products of the query that is t from the end of its group with the key
// that is t from the start of its group. Queries and keys that do not exist are zeros.
double GroupLogit(const SelectingHead& head, int32_t query_group, int32_t key_group) {
  const int32_t stride = head.options().stride;
  double sum = 0;
  for (int32_t t = 0; t < stride; ++t) {
    const int32_t position = (query_group + 1) * stride - 1 - t;
    const int32_t slot = key_group * stride + t;
    if (!head.HasQuery(position) || slot >= head.s().k_len) continue;
    for (int32_t d = 0; d < head.g.head_dim; ++d) {
      sum += head.Q(position, d) * head.K(slot, d);
    }
  }
  return sum / (std::sqrt(head.g.head_dim) * stride);
}

bool HasAnyQuery(const SelectingHead& head, int32_t group) {
  const int32_t stride = head.options().stride;
  return (group + 1) * stride > head.s().query_offset &&
         group * stride < head.s().k_len;
}

// Tokens that the published code estimates together.
int32_t ChunkTokens(int32_t k_len) {
  int64_t power = 1;
  while (power < k_len) power *= 2;
  const int64_t memory = (int64_t{1} << 28) / power;
  const int64_t tokens = std::min(std::max<int64_t>(2048, power), memory);
  return static_cast<int32_t>(std::max<int64_t>(tokens, 2048));
}

// Attention mass of the candidates of a query block.
std::vector<double> Masses(const SelectingHead& head, int32_t i) {
  const int32_t groups_per_block = head.g.block_size / head.options().stride;
  const int32_t candidates = head.NumCandidates(i);
  std::vector<double> masses(static_cast<size_t>(candidates));
  for (int32_t r = 0; r < groups_per_block; ++r) {
    const int32_t query_group = head.Block(i) * groups_per_block + r;
    if (!HasAnyQuery(head, query_group)) continue;
    const int32_t visible = std::min(query_group + 1, candidates * groups_per_block);
    std::vector<double> row;
    for (int32_t j = 0; j < visible; ++j) {
      row.push_back(GroupLogit(head, query_group, j));
    }
    Softmax(row);
    for (int32_t j = 0; j < visible; ++j) masses[j / groups_per_block] += row[j];
  }
  return masses;
}

}  // namespace

Kept SelectByAntidiagonals(const SelectingHead& head) {
  const AttentionOptions& options = head.options();
  const int32_t first_chunk = ChunkTokens(head.s().k_len) / head.g.block_size;
  Kept kept;
  for (int32_t i = 0; i < head.s().num_query_blocks; ++i) {
    const int32_t block = head.Block(i);
    const ForcedMass forced = {
        .own = head.NumCandidates(i) > block ? block : -1,
        .first = options.force_first_block ? head.FirstBlock() : -1,
        .lags = options.as_published && block < first_chunk};
    kept.push_back(CoverWithForced(Masses(head, i), options.threshold, forced));
  }
  return kept;
}

}  // namespace pbs::reference
