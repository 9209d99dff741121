#include "methods/vertical_slash.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

namespace pbs {
namespace {

// Writes the indices of the largest values, ascending. Of equal values the lower index
// is taken first. The first `num_forced` values count as infinite.
void LargestIndices(std::span<float> values, int32_t num_forced,
                    std::span<uint64_t> scratch, std::span<int32_t> chosen) {
  const size_t forced = std::min(values.size(), static_cast<size_t>(num_forced));
  std::fill_n(values.begin(), forced, INFINITY);
  const std::span<uint64_t> keys = scratch.first(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t falling = ~std::bit_cast<uint32_t>(values[i]);
    keys[i] = (static_cast<uint64_t>(falling) << 32) | static_cast<uint32_t>(i);
  }
  if (chosen.size() < keys.size()) {
    std::nth_element(keys.begin(), keys.begin() + static_cast<int64_t>(chosen.size()),
                     keys.end());
  }
  for (size_t i = 0; i < chosen.size(); ++i) {
    chosen[i] = static_cast<int32_t>(keys[i] & 0xFFFFFFFFu);
  }
  std::sort(chosen.begin(), chosen.end());
}

}  // namespace

void ChooseLines(std::span<float> columns, std::span<float> distances,
                 std::span<uint64_t> scratch, std::span<int32_t> chosen_columns,
                 std::span<int32_t> chosen_distances) {
  LargestIndices(columns, kForcedColumns, scratch, chosen_columns);
  LargestIndices(distances, kForcedDistances, scratch, chosen_distances);
  std::reverse(chosen_distances.begin(), chosen_distances.end());
}

int32_t MakeSpans(std::span<const int32_t> distances, int32_t position,
                  KeySpan* spans) {
  const int32_t group_end = position / kRowGroup * kRowGroup + kRowGroup;
  const auto first = std::lower_bound(distances.begin(), distances.end(), group_end - 1,
                                      std::greater<>());
  int32_t count = 0;
  for (auto distance = first; distance != distances.end(); ++distance) {
    const int32_t end = std::max(group_end - *distance, kRowGroup);
    if (count == 0 || end > spans[count - 1].end + kRowGroup) {
      spans[count++] = {end - kRowGroup, end};
    } else if (end > spans[count - 1].end) {
      spans[count - 1].end += kRowGroup;
    }
  }
  return count;
}

}  // namespace pbs
