// Block selection: chooses the key blocks that one query block reads (arXiv 2510.21270,
// section 3.3; docs/KERNELS.md states the rule).
//
// Threading: stateless. Memory: allocates nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace pbs {

// Blocks [0, num_candidates) may be selected by score. Blocks [own_begin, own_end) of
// the query's own segment are always read, and so is `forced_block` when it is not
// negative. Own blocks may be candidates too (mean pooling: the diagonal has a share of
// the mass).
struct SelectionRow {
  int32_t num_candidates = 0;
  int32_t own_begin = 0;
  int32_t own_end = 0;
  int32_t forced_block = -1;
  float threshold = 0.9f;  // (0, 1]; 1 selects every candidate
};

struct SelectedRow {
  int32_t count = 0;       // entries written to `list`
  int32_t num_masked = 0;  // trailing entries inside the own segment
};

// Writes the fewest highest-scored candidates whose softmax mass reaches
// `row.threshold`, joined with the forced blocks, ascending. Of equal scores the lower
// block is taken first. A row whose mass never reaches the threshold because of
// rounding takes every candidate.
//
//   logits  [num_candidates]  scaled pooled logits
//   scratch [num_candidates]
//   list    [max(num_candidates, own_end)]  out
//
// nullopt when a logit is not finite; `list` is then unspecified.
std::optional<SelectedRow> SelectRow(const SelectionRow& row,
                                     std::span<const float> logits,
                                     std::span<uint64_t> scratch, uint16_t* list);

}  // namespace pbs
