// The largest of many values in global memory whose sum stays within a mass, without a
// sort.
//
// As in mass_cut.h, the bits of non-negative floats are ordered like the floats. A
// thread block finds the bits of the largest value that is left out, two at a time:
// values that do not fit shared memory are read half as often as with bisections.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/tiles/block_values.h"

namespace pbs::cuda {

// Kept are values above `least`, and the first `ties` of those equal to it.
struct MassWithin {
  uint32_t least;  // bits
  int64_t ties;
  int64_t num_above;  // values above `least`
};

// Calls body(value) for the calling thread's values: every kThreads-th.
template <int kThreads, class Body>
PBS_DEVICE void ForEachValue(const float* values, int64_t count, Body&& body) {
  constexpr int kUnderWay = 8;  // loads
  PBS_NO_UNROLL
  for (int64_t first = ThreadIndex(); first < count; first += kUnderWay * kThreads) {
    float loaded[kUnderWay];
    PBS_UNROLL
    for (int i = 0; i < kUnderWay; ++i) {
      const int64_t at = first + i * kThreads;
      loaded[i] = at < count ? LoadGlobal(values + at) : 0.0f;
    }
    PBS_UNROLL
    for (int i = 0; i < kUnderWay; ++i) body(loaded[i]);
  }
}

// Values are in [0, 2). All threads of the thread block call, and get the result.
template <int kThreads>
PBS_DEVICE MassWithin KeepWithin(const float* values, int64_t count, float mass,
                                 BlockValues<kThreads>& block) {
  uint32_t out = 0;  // the largest bits from which on the sum is above `mass`
  PBS_NO_UNROLL
  for (int shift = 28; shift >= 0; shift -= 2) {
    float sums[3] = {};
    ForEachValue<kThreads>(values, count, [&](float value) {
      PBS_UNROLL
      for (uint32_t digit = 1; digit <= 3; ++digit) {
        if (FloatBits(value) >= out + (digit << shift)) sums[digit - 1] += value;
      }
    });
    block.Add(sums);
    const uint32_t digit = sums[2] > mass ? 3 : sums[1] > mass ? 2 : sums[0] > mass;
    out += digit << shift;
  }
  if (out == 0) return {0, INT64_MAX, 0};  // all of them are within `mass`
  float sum = 0;
  int num_above = 0;
  ForEachValue<kThreads>(values, count, [&](float value) {
    if (FloatBits(value) <= out) return;
    sum += value;
    ++num_above;
  });
  const float left = (mass - block.Sum(sum)) / BitsToFloat(out);
  const int64_t ties =
      left < static_cast<float>(count) ? static_cast<int64_t>(left) : count;
  return {out, ties, block.Sum(num_above)};
}

}  // namespace pbs::cuda
