// Variants of the attention kernels, for comparisons.
#pragma once

#include <array>
#include <cstdint>

namespace pbs::cuda {

enum class AttentionVariant : int32_t {
  kChosen,          // the backend's default
  kAmpere,          // the kernels of compute capability 8.0, on any device
  kOneSection,      // tiles ordered only by length, not by the keys that they read
  kWithoutOverlap,  // each kernel starts after the one before it has ended
  kValuesFirst,     // values are requested before the next block's keys
  kMoreStages,      // one more stage of keys and values
  kDirectOutputs,   // one buffer of queries, outputs stored from registers
  kCacheHints,      // the second-level cache evicts queries first, keys and values last
  kWithoutTurns,    // consumers do not take turns in issuing products
  kWideTiles,       // 192 query rows (head dim 64, every block read)
};
// Indexed by AttentionVariant.
inline constexpr std::array<const char*, 10> kAttentionVariantNames = {
    "chosen",      "ampere",         "one_section", "without_overlap", "values_first",
    "more_stages", "direct_outputs", "cache_hints", "without_turns",   "wide_tiles"};

}  // namespace pbs::cuda
