// Every limit of the attention API, in one place. Refusals quote these values.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace pbs {

inline constexpr std::array<int32_t, 5> kHeadDims = {32, 64, 96, 128, 256};
// "32, 64, 96, 128, 256", for refusals.
std::string HeadDimsText();
inline constexpr int32_t kNumHeadsMax = 1024;          // query heads
inline constexpr int32_t kNumSequencesMax = 65'536;    // sequences of one batch
inline constexpr int64_t kHeadSequencesMax = 1 << 18;  // query heads x sequences
inline constexpr int32_t kSeqLenMax = 1 << 20;         // keys of one sequence
inline constexpr int64_t kTotalTokensMax = 1 << 24;    // keys of one batch
inline constexpr int32_t kBlockSizeMin = 16;           // tokens; a power of two
inline constexpr int32_t kBlockSizeMax = 256;
inline constexpr int32_t kSegmentSizeMax = 16'384;  // tokens; a multiple of the block
inline constexpr int32_t kKeyBlocksMax = 65'535;    // block indices and counts: uint16
inline constexpr int32_t kCoverageRowsMax = 1024;  // sampled rows per sequence and head

}  // namespace pbs
