// Which attention kernels run, for who compares them.
#pragma once

#include <array>
#include <cstdint>

namespace pbs::cuda {

enum class AttentionVariant : int32_t {
  kChosen,          // what a backend runs
  kAmpere,          // the kernels of compute capability 8.0, on any device
  kOneSection,      // tiles by length alone, whatever keys they read
  kWithoutOverlap,  // each kernel begins when the one before it has ended
  kValuesFirst,     // values are asked for before the next block's keys
  kMoreStages,      // of keys and values: one more
  kDirectOutputs,   // one buffer of queries, outputs from registers
  kCacheHints,      // queries leave the second cache first, keys and values last
  kWithoutTurns,    // consumers do not take turns in issuing products
  kWideTiles,       // 192 query rows (head dim 64, every block read)
};
// By AttentionVariant.
inline constexpr std::array<const char*, 10> kAttentionVariantNames = {
    "chosen",      "ampere",         "one_section", "without_overlap", "values_first",
    "more_stages", "direct_outputs", "cache_hints", "without_turns",   "wide_tiles"};

}  // namespace pbs::cuda
