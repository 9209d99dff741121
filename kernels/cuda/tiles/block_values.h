// Combines the values of all threads of a thread block.
#pragma once

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

// All threads call. The order of the sums is fixed, so equal values give equal bits.
template <int kThreads>
class BlockValues {
 public:
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kCountMax = 3;
  static constexpr int kSharedBytes = 2 * kWarps * kCountMax * 8;

  // `shared`: kSharedBytes, 8-byte aligned.
  PBS_DEVICE explicit BlockValues(void* shared)
      : shared_(static_cast<uint8_t*>(shared)) {}

  // Each value becomes the combination of that of all threads. Values of the last call
  // may still be read by other threads, so two buffers take turns.
  template <class T, int kCount, class Combine>
  PBS_DEVICE void Reduce(T (&values)[kCount], Combine&& combine) {
    static_assert(kCount <= kCountMax && sizeof(T) <= 8);
    auto* parts = reinterpret_cast<T*>(shared_ + turn_ * (kSharedBytes / 2));
    turn_ ^= 1;
    PBS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      PBS_UNROLL
      for (int mask = 1; mask < 32; mask *= 2) {
        values[i] = combine(values[i], ShuffleXor(values[i], mask));
      }
      if (ThreadIndex() % 32 == 0) {
        StoreShared(parts + ThreadIndex() / 32 * kCount + i, values[i]);
      }
    }
    SyncThreads();
    PBS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      values[i] = LoadShared(parts + i);
      for (int warp = 1; warp < kWarps; ++warp) {
        values[i] = combine(values[i], LoadShared(parts + warp * kCount + i));
      }
    }
  }

  template <class T, int kCount>
  PBS_DEVICE void Add(T (&values)[kCount]) {
    Reduce(values, [](T a, T b) { return a + b; });
  }
  template <class T>
  PBS_DEVICE T Sum(T value) {
    T values[] = {value};
    Add(values);
    return values[0];
  }
  PBS_DEVICE float Largest(float value) {
    float values[] = {value};
    Reduce(values, [](float a, float b) { return Max(a, b); });
    return values[0];
  }

 private:
  uint8_t* const shared_;
  int turn_ = 0;
};

}  // namespace pbs::cuda
