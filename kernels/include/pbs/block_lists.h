// Block lists: the key blocks that each query block reads, as CSR over (sequence, query
// head, query block).
//
// A row lists ascending key-block *slots* (blocks of the permuted key array). Its last
// `num_masked` entries belong to the query block's own segment. A key can be later than
// a query only in that segment, so kernels compare positions only there. Kernels read a
// row backwards, so that the masked blocks come first. Dense attention needs no lists
// (see attention.h).
//
// Rows are ordered by sequence, then head, then query block:
//   row(s, h, i) = sum over earlier sequences (num_heads * num_query_blocks)
//                  + h * num_query_blocks(s) + i
//
// Threading: values. Memory: `BlockLists` owns its arrays, `BlockListsView` borrows.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "pbs/status.h"

namespace pbs {

// Unused entries may follow a row, so that rows can be written in parallel into a
// buffer of worst-case size.
struct BlockListsView {
  int64_t num_rows = 0;
  const int64_t* begin = nullptr;        // [num_rows] first entry of a row in `indices`
  const uint16_t* count = nullptr;       // [num_rows] entries of a row
  const uint16_t* num_masked = nullptr;  // [num_rows] trailing entries to mask
  const uint16_t* indices = nullptr;

  std::span<const uint16_t> Row(int64_t row) const {
    return {indices + begin[row], count[row]};
  }
};

// Compact lists: row r is indices[begin[r] .. begin[r] + count[r]), rows back to back.
struct BlockLists {
  std::vector<int64_t> begin;
  std::vector<uint16_t> count;
  std::vector<uint16_t> num_masked;
  std::vector<uint16_t> indices;

  BlockListsView View() const {
    return {.num_rows = static_cast<int64_t>(count.size()),
            .begin = begin.data(),
            .count = count.data(),
            .num_masked = num_masked.data(),
            .indices = indices.data()};
  }
};

}  // namespace pbs
