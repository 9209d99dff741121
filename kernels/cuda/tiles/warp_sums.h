// Sums over the lanes of a warp; all 32 call.
#pragma once

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

template <class T>
PBS_DEVICE T SumOfWarp(T value) {
  PBS_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) value += ShuffleXor(value, mask);
  return value;
}

// Sum over the lanes up to and including this one.
template <class T>
PBS_DEVICE T SumOfLanesUpTo(T value) {
  const int lane = ThreadIndex() % 32;
  PBS_UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    const T before = Shuffle(value, lane < distance ? lane : lane - distance);
    if (lane >= distance) value += before;
  }
  return value;
}

}  // namespace pbs::cuda
