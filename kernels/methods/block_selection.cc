#include "methods/block_selection.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace pbs {
namespace {

// Keeps a selected candidate's index in the low half; the high half sorts downwards.
uint64_t SortKey(float probability, int32_t block) {
  const uint32_t falling = ~std::bit_cast<uint32_t>(probability);
  return (static_cast<uint64_t>(falling) << 32) | static_cast<uint32_t>(block);
}

float Probability(uint64_t key) {
  return std::bit_cast<float>(~static_cast<uint32_t>(key >> 32));
}

// Leaves the selected candidates at the front of `keys`; returns how many.
int32_t CoverThreshold(float threshold, std::span<uint64_t> keys) {
  const auto n = static_cast<int32_t>(keys.size());
  if (threshold >= 1.0f) return n;
  std::sort(keys.begin(), keys.end());
  double mass = 0;
  for (int32_t i = 0; i < n; ++i) {
    mass += Probability(keys[i]);
    if (mass >= threshold) return i + 1;
  }
  return n;
}

// False when a logit is not finite.
bool SoftmaxKeys(std::span<const float> logits, std::span<uint64_t> keys) {
  float top = -INFINITY;
  bool finite = true;
  for (float logit : logits) {
    finite &= std::isfinite(logit);
    top = std::max(top, logit);
  }
  if (!finite) return false;
  double sum = 0;
  for (size_t j = 0; j < logits.size(); ++j) {
    const float e = std::exp(logits[j] - top);
    keys[j] = std::bit_cast<uint32_t>(e);
    sum += e;
  }
  const auto scale = static_cast<float>(1.0 / sum);
  for (size_t j = 0; j < logits.size(); ++j) {
    const float e = std::bit_cast<float>(static_cast<uint32_t>(keys[j]));
    keys[j] = SortKey(e * scale, static_cast<int32_t>(j));
  }
  return true;
}

}  // namespace

std::optional<SelectedRow> SelectRow(const SelectionRow& row,
                                     std::span<const float> logits,
                                     std::span<uint64_t> scratch, uint16_t* list) {
  const std::span<uint64_t> keys = scratch.first(logits.size());
  int32_t num_selected = 0;
  if (!logits.empty()) {
    if (!SoftmaxKeys(logits, keys)) return std::nullopt;
    num_selected = CoverThreshold(row.threshold, keys);
  }
  int32_t count = 0;
  for (int32_t i = 0; i < num_selected; ++i) {
    const auto block = static_cast<int32_t>(keys[i] & 0xFFFFFFFFu);
    if (block < row.own_begin) list[count++] = static_cast<uint16_t>(block);
  }
  std::sort(list, list + count);
  if (row.forced_block >= 0 && row.forced_block < row.own_begin) {
    const auto forced = static_cast<uint16_t>(row.forced_block);
    uint16_t* at = std::lower_bound(list, list + count, forced);
    if (at == list + count || *at != forced) {
      std::copy_backward(at, list + count, list + count + 1);
      *at = forced;
      ++count;
    }
  }
  for (int32_t block = row.own_begin; block < row.own_end; ++block) {
    list[count++] = static_cast<uint16_t>(block);
  }
  return SelectedRow{.count = count, .num_masked = row.own_end - row.own_begin};
}

}  // namespace pbs
