// Columns and diagonals of attention (MInference, arXiv 2407.02490; docs/KERNELS.md,
// "Vertical and slash").
//
// A head has chosen key columns and chosen distances between query and key. Query rows
// work in groups of kRowGroup positions. A group reads spans of keys that cover its
// distances, and the columns outside of them.
//
// Threading: stateless. Memory: allocates nothing.
#pragma once

#include <cstdint>
#include <span>

namespace pbs {

inline constexpr int32_t kRowGroup = 64;       // positions of a group; keys of a tile
inline constexpr int32_t kLineQueries = 64;    // last queries that choose the lines
inline constexpr int32_t kForcedColumns = 30;  // first columns, always chosen
inline constexpr int32_t kForcedDistances = 100;  // smallest distances, chosen first
inline constexpr int32_t kColumnsMin = 30;
inline constexpr int32_t kDistancesMin = 50;

// How many columns and distances a sequence of `k_len` keys has.
constexpr int32_t NumColumns(int32_t vertical_tokens, int32_t k_len) {
  const int32_t wanted = vertical_tokens > kColumnsMin ? vertical_tokens : kColumnsMin;
  return wanted < k_len ? wanted : k_len;
}
constexpr int32_t NumDistances(int32_t slash_tokens, int32_t k_len) {
  const int32_t wanted = slash_tokens > kDistancesMin ? slash_tokens : kDistancesMin;
  return wanted < k_len ? wanted : k_len;
}

struct KeySpan {
  int32_t begin = 0;
  int32_t end = 0;
};
// The most spans of a group in a sequence of `k_len` keys.
constexpr int32_t SpansMax(int32_t k_len) { return k_len / kRowGroup + 2; }

// Chosen lines of a head, as the report of the last queries ranks them.
//
//   columns    [k_len]  mass of each key; overwritten
//   distances  [k_len]  mass of each distance; overwritten
//   scratch    [k_len]
//   chosen_columns    [NumColumns()]    out, ascending
//   chosen_distances  [NumDistances()]  out, descending
void ChooseLines(std::span<float> columns, std::span<float> distances,
                 std::span<uint64_t> scratch, std::span<int32_t> chosen_columns,
                 std::span<int32_t> chosen_distances);

// The spans of the group of the query position `position`: ascending, disjoint, not
// aligned. The last may end after the group's last position.
//
//   distances  descending; distance 0 is one of them
//   spans      [SpansMax()]  out
int32_t MakeSpans(std::span<const int32_t> distances, int32_t position, KeySpan* spans);

}  // namespace pbs
