// Block selection: chooses the key blocks that one query block reads (arXiv 2510.21270,
// section 3.3; docs/KERNELS.md states the rules).
//
// A rule marks the blocks that it keeps by their scores in `keep`, one byte per key
// block, and leaves the other bytes as they are. KeepForced() adds the blocks that are
// read whatever their scores are. WriteList() makes the list.
//
// Threading: stateless. Memory: allocates nothing.
#pragma once

#include <cstdint>
#include <span>

namespace pbs {

// Softmaxes `logits` and keeps the fewest largest whose mass reaches `threshold`, (0,
// 1]. Of equal logits the lower block is taken first. All are kept when the threshold
// is 1, or when rounding makes the mass stay below it.
//
//   logits  [num_candidates]
//   scratch [num_candidates]
//   keep    [num_candidates]  out
//
// False when a logit is not finite; `keep` is then unspecified.
bool KeepCover(float threshold, std::span<const float> logits,
               std::span<uint64_t> scratch, std::span<uint8_t> keep);

// How KeepCoverWithForced() counts forced blocks.
struct ForcedMass {
  int32_t own = -1;    // a block that is kept and counts first; -1: none
  int32_t first = -1;  // another, or the same
  // As published for the first chunk of rows: `first` is ranked like the others, the
  // largest other is always taken, and the r-th is judged by the mass of one block less
  // than was taken before it.
  bool lags = false;
};

// Keeps the forced blocks, then the largest others while the mass that was taken before
// is under `threshold` times the sum of `masses` (XAttention). Of equal masses the
// lower block is taken first. All are kept when the threshold is 1.
//
//   masses  [num_candidates]  finite, >= 0
//   scratch, keep  as above
void KeepCoverWithForced(float threshold, const ForcedMass& forced,
                         std::span<const float> masses, std::span<uint64_t> scratch,
                         std::span<uint8_t> keep);

// Keeps the blocks whose score is at least `share` times the largest (FlashPrefill).
//   scores [num_candidates]  finite, >= 0
void KeepShareOfLargest(float share, std::span<const float> scores,
                        std::span<uint8_t> keep);

// The blocks that one query block reads whatever their scores are: those of its own
// segment, [own_begin, own_end), and of those before it `first_block` when it is not
// negative, [0, sink_end), and [window_begin, own_begin).
struct ForcedBlocks {
  int32_t own_begin = 0;
  int32_t own_end = 0;
  int32_t first_block = -1;
  int32_t sink_end = 0;
  int32_t window_begin = 0;
};

//   keep [forced.own_begin]
void KeepForced(const ForcedBlocks& forced, std::span<uint8_t> keep);

// Writes the kept blocks before forced.own_begin and the blocks of the own segment,
// ascending. Returns how many.
//   keep [forced.own_begin]
//   list [forced.own_end]  out
int32_t WriteList(const ForcedBlocks& forced, std::span<const uint8_t> keep,
                  uint16_t* list);

}  // namespace pbs
