// The largest weights of a row that together have a wanted mass, without a sort.
//
// The bits of non-negative floats are ordered like the floats, so bisections of the
// range of bits find the smallest weight that is needed. Mass is summed in the same
// order each time, so that it never falls when more weights are summed.
//
// One warp calls each function, all lanes.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/selection_params.h"
#include "cuda/tiles/warp_sums.h"

namespace pbs::cuda {

// What is selected: weights above `least`, and the first `ties` of those equal to it.
struct MassCut {
  uint32_t least;  // bits of the smallest selected weight
  int ties;        // the number of selected weights with exactly these bits
};

// Share of the mass that a query head keeps, by the scores of a band.
PBS_DEVICE float ThresholdOf(const SelectionParams& params, int head, int band) {
  return band < params.bands_by_head ? LoadGlobal(params.head_thresholds + head)
                                     : params.thresholds[band];
}

PBS_DEVICE MassCut SelectsAll() { return {0, INT32_MAX}; }
PBS_DEVICE MassCut SelectsNone() { return {0xFFFFFFFFu, 0}; }
constexpr uint32_t kOneBits = 0x3F800000u;       // bits of 1.0f
constexpr uint32_t kInfinityBits = 0x7F800000u;  // more than those of any finite float

// Sum of the weights in shared memory whose bits are at least `bits`.
PBS_DEVICE float MassFrom(const float* weights, int count, uint32_t bits) {
  float sum = 0;
  for (int i = ThreadIndex() % 32; i < count; i += 32) {
    const float weight = LoadShared(weights + i);
    if (FloatBits(weight) >= bits) sum += weight;
  }
  for (int mask = 1; mask < 32; mask *= 2) sum += ShuffleXor(sum, mask);
  return sum;
}

// The fewest largest weights whose mass reaches `wanted` > 0; all when their sum does
// not. `largest`: bits that no weight exceeds.
PBS_DEVICE MassCut CutByMass(const float* weights, int count, float wanted,
                             uint32_t largest) {
  uint32_t least = 0;
  uint32_t above = largest + 1;  // weights of at least this have too little mass
  while (above - least > 1) {
    const uint32_t middle = least + (above - least) / 2;
    if (MassFrom(weights, count, middle) >= wanted) {
      least = middle;
    } else {
      above = middle;
    }
  }
  if (least == 0) return SelectsAll();
  const float missing = wanted - MassFrom(weights, count, least + 1);
  const int ties = static_cast<int>(Ceil(missing / BitsToFloat(least)));
  return {least, ties < 1 ? 1 : ties};
}

// The `wanted` largest weights; of equal ones the first.
PBS_DEVICE MassCut CutByCount(const float* weights, int count, int wanted) {
  if (wanted >= count) return SelectsAll();
  const auto num_from = [&](uint32_t bits) {
    int found = 0;
    for (int i = ThreadIndex() % 32; i < count; i += 32) {
      found += FloatBits(LoadShared(weights + i)) >= bits ? 1 : 0;
    }
    return SumOfWarp(found);
  };
  uint32_t least = 0;
  uint32_t above = kInfinityBits + 1;
  while (above - least > 1) {
    const uint32_t middle = least + (above - least) / 2;
    (num_from(middle) >= wanted ? least : above) = middle;
  }
  return {least, wanted - num_from(least + 1)};
}

// Whether a weight is selected, if it is a candidate. To be called for neighbouring
// weights and in rising order: `cut` counts the ties that were met.
PBS_DEVICE bool IsSelected(const float* weights, MassCut& cut, int index,
                           bool is_candidate) {
  const uint32_t before = (1u << ThreadIndex() % 32) - 1;
  const uint32_t bits = is_candidate ? FloatBits(LoadShared(weights + index)) : 0;
  const uint32_t tied = Ballot(is_candidate && bits == cut.least);
  const bool selected =
      is_candidate && (bits > cut.least || (bits == cut.least &&
                                            PopulationCount(tied & before) < cut.ties));
  cut.ties -= PopulationCount(tied);
  return selected;
}

}  // namespace pbs::cuda
