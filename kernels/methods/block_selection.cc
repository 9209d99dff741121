#include "methods/block_selection.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

namespace pbs {
namespace {

// Orders blocks by falling score, then by rising index. Scores are not negative, so
// their bits rise with them.
uint64_t SortKey(float score, size_t block) {
  const uint32_t falling = ~std::bit_cast<uint32_t>(score);
  return (static_cast<uint64_t>(falling) << 32) | static_cast<uint32_t>(block);
}

float ScoreOf(uint64_t key) {
  return std::bit_cast<float>(~static_cast<uint32_t>(key >> 32));
}

size_t BlockOf(uint64_t key) { return key & 0xFFFFFFFFu; }

// Softmax as sort keys. False when a logit is not finite.
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
    keys[j] = SortKey(e * scale, j);
  }
  return true;
}

void KeepAll(std::span<uint8_t> keep) {
  std::fill(keep.begin(), keep.end(), uint8_t{1});
}

}  // namespace

bool KeepCover(float threshold, std::span<const float> logits,
               std::span<uint64_t> scratch, std::span<uint8_t> keep) {
  const std::span<uint64_t> keys = scratch.first(logits.size());
  if (!SoftmaxKeys(logits, keys)) return false;
  if (threshold >= 1.0f) {
    KeepAll(keep.first(logits.size()));
    return true;
  }
  std::sort(keys.begin(), keys.end());
  double mass = 0;
  for (uint64_t key : keys) {
    keep[BlockOf(key)] = 1;
    mass += ScoreOf(key);
    if (mass >= threshold) break;
  }
  return true;
}

void KeepCoverWithForced(float threshold, const ForcedMass& forced,
                         std::span<const float> masses, std::span<uint64_t> scratch,
                         std::span<uint8_t> keep) {
  if (threshold >= 1.0f) return KeepAll(keep.first(masses.size()));
  const auto own = static_cast<size_t>(forced.own);
  const auto first = static_cast<size_t>(forced.first);
  double need = 0;
  double taken = 0;
  size_t num_others = 0;
  for (size_t j = 0; j < masses.size(); ++j) {
    need += masses[j];
    const bool counts = j == own || (j == first && !forced.lags);
    if (counts) taken += masses[j];
    if (j == own || j == first) keep[j] = 1;
    if (!counts) scratch[num_others++] = SortKey(masses[j], j);
  }
  need *= threshold;
  const std::span<uint64_t> others = scratch.first(num_others);
  std::sort(others.begin(), others.end());
  double last = 0;
  for (size_t r = 0; r < others.size(); ++r) {
    const double judged = forced.lags ? taken - last : taken;
    if (!(forced.lags && r == 0 ? need > 0 : judged < need)) break;
    keep[BlockOf(others[r])] = 1;
    last = ScoreOf(others[r]);
    taken += last;
  }
}

void KeepShareOfLargest(float share, std::span<const float> scores,
                        std::span<uint8_t> keep) {
  float largest = 0;
  for (float score : scores) largest = std::max(largest, score);
  for (size_t j = 0; j < scores.size(); ++j) {
    if (scores[j] >= share * largest) keep[j] = 1;
  }
}

void KeepForced(const ForcedBlocks& forced, std::span<uint8_t> keep) {
  const auto fill = [&](int32_t begin, int32_t end) {
    for (int32_t block = begin; block < std::min(end, forced.own_begin); ++block) {
      keep[static_cast<size_t>(block)] = 1;
    }
  };
  if (forced.first_block >= 0) fill(forced.first_block, forced.first_block + 1);
  fill(0, forced.sink_end);
  fill(std::max(forced.window_begin, 0), forced.own_begin);
}

int32_t WriteList(const ForcedBlocks& forced, std::span<const uint8_t> keep,
                  uint16_t* list) {
  int32_t count = 0;
  for (int32_t block = 0; block < forced.own_begin; ++block) {
    list[count] = static_cast<uint16_t>(block);
    count += keep[static_cast<size_t>(block)];
  }
  for (int32_t block = forced.own_begin; block < forced.own_end; ++block) {
    list[count++] = static_cast<uint16_t>(block);
  }
  return count;
}

}  // namespace pbs
