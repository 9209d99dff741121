// Standard normals from a small generator that is seeded for each position.
//
// Threading: one generator per thread. Memory: 32 bytes; generators share the tables.
#pragma once

#include <bit>
#include <cstdint>
#include <span>

namespace pbs {

// Mixes `value` into `key` (the finaliser of a 64-bit hash), so that streams of
// neighbouring positions are independent.
constexpr uint64_t MixKey(uint64_t key, uint64_t value) {
  uint64_t x = key ^ (value + 0x9E3779B97F4A7C15u + (key << 6) + (key >> 2));
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

class NormalSource {
 public:
  explicit NormalSource(uint64_t key) {
    for (uint64_t i = 0; i < 4; ++i) state_[i] = MixKey(key, i);
  }

  // xoshiro256++.
  uint64_t Bits() {
    const uint64_t result = std::rotl(state_[0] + state_[3], 23) + state_[0];
    const uint64_t shifted = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = std::rotl(state_[3], 45);
    return result;
  }
  // In [0, 1).
  double Uniform() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }
  double Sign() { return (Bits() & 1) != 0 ? 1.0 : -1.0; }
  double Normal();
  void Fill(std::span<float> values) {
    for (float& value : values) value = static_cast<float>(Normal());
  }

 private:
  uint64_t state_[4];
};

}  // namespace pbs
