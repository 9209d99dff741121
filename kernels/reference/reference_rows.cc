// Scores of query rows and mean keys (flashprefill): the sum over the rows of a query
// block of exp(logit), and the blocks of at least a share of the largest.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/reference_rules.h"
#include "reference/reference_select.h"

namespace pbs::reference {
namespace {

// A row sees the blocks whose last token is not later: of the diagonal block only the
// last row. Sorted keys are candidates in earlier segments only, which every row sees.
bool Sees(const SelectingHead& head, int32_t position, int32_t block) {
  return position >= (block + 1) * head.g.block_size - 1;
}

// Logit of each row with each candidate, -inf where the row does not see it. As
// published, rows of zeros fill a short last block.
std::vector<std::vector<double>> RowLogits(const SelectingHead& head, int32_t i,
                                           const Means& keys) {
  const int32_t begin = head.Block(i) * head.g.block_size;
  std::vector<std::vector<double>> logits;
  for (int32_t position = begin; position < begin + head.g.block_size; ++position) {
    const bool is_zero = head.options().as_published && position >= head.s().k_len;
    if (!head.HasQuery(position) && !is_zero) continue;
    logits.emplace_back();
    for (int32_t j = 0; j < head.NumCandidates(i); ++j) {
      double dot = 0;
      for (int32_t d = 0; d < head.g.head_dim && !is_zero; ++d) {
        dot += head.Q(position, d) * keys[j][d];
      }
      logits.back().push_back(Sees(head, position, j) ? dot / std::sqrt(head.g.head_dim)
                                                      : -INFINITY);
    }
  }
  return logits;
}

}  // namespace

Kept SelectByRows(const SelectingHead& head) {
  const Means keys = KeyMeans(head, ShortBlock::kLength);
  Kept kept;
  for (int32_t i = 0; i < head.s().num_query_blocks; ++i) {
    const std::vector<std::vector<double>> logits = RowLogits(head, i, keys);
    double top = -INFINITY;
    for (const std::vector<double>& row : logits) {
      for (double logit : row) top = std::max(top, logit);
    }
    std::vector<double> energies(static_cast<size_t>(head.NumCandidates(i)));
    for (const std::vector<double>& row : logits) {
      for (size_t j = 0; j < row.size(); ++j) {
        if (!std::isinf(row[j])) energies[j] += std::exp(row[j] - top);
      }
    }
    kept.push_back(ShareOfLargest(energies, head.options().alpha));
  }
  return kept;
}

}  // namespace pbs::reference
