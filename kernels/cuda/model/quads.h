// Rows of any dtype, four elements at a time: 16 bytes of f32, 8 of the others. All
// pointwise kernels of the model path read and write through these, in f32.
#pragma once

#include <cstdint>

#include "cuda/model/model_params.h"
#include "cuda/primitives/primitives.h"
#include "pbs/dtype.h"

namespace pbs::cuda {

struct Quad {
  float x[kQuad];
};

// Elements [4 quad, 4 quad + 4) of the array at `data`, which is aligned to four.
PBS_DEVICE Quad LoadQuad(const void* data, DType dtype, int64_t quad) {
  if (dtype == DType::kF32) {
    const Words4 words = LoadGlobal(static_cast<const Words4*>(data) + quad);
    return {BitsToFloat(words.words[0]), BitsToFloat(words.words[1]),
            BitsToFloat(words.words[2]), BitsToFloat(words.words[3])};
  }
  const Int2 pairs = LoadGlobal(static_cast<const Int2*>(data) + quad);
  const auto low = static_cast<uint32_t>(pairs.x);
  const auto high = static_cast<uint32_t>(pairs.y);
  if (dtype == DType::kBF16) {
    return {Bf16Element::Low(low), Bf16Element::High(low), Bf16Element::Low(high),
            Bf16Element::High(high)};
  }
  return {F16Element::Low(low), F16Element::High(low), F16Element::Low(high),
          F16Element::High(high)};
}

PBS_DEVICE void StoreQuad(void* data, DType dtype, int64_t quad, const Quad& value) {
  const float* x = value.x;
  if (dtype == DType::kF32) {
    StoreGlobal(
        static_cast<Words4*>(data) + quad,
        Words4{FloatBits(x[0]), FloatBits(x[1]), FloatBits(x[2]), FloatBits(x[3])});
    return;
  }
  const bool bf16 = dtype == DType::kBF16;
  const uint32_t low =
      bf16 ? Bf16Element::Pack(x[0], x[1]) : F16Element::Pack(x[0], x[1]);
  const uint32_t high =
      bf16 ? Bf16Element::Pack(x[2], x[3]) : F16Element::Pack(x[2], x[3]);
  StoreGlobal(static_cast<Int2*>(data) + quad,
              Int2{static_cast<int32_t>(low), static_cast<int32_t>(high)});
}

// The value after it was stored as `dtype` and loaded again.
PBS_DEVICE Quad Rounded(const Quad& value, DType dtype) {
  if (dtype == DType::kF32) return value;
  Quad rounded;
  PBS_UNROLL
  for (int i = 0; i < kQuad; ++i) {
    rounded.x[i] = dtype == DType::kBF16 ? Bf16Element::Round(value.x[i])
                                         : F16Element::Round(value.x[i]);
  }
  return rounded;
}

// Sum of `value` over the lanes whose indices differ in bits below `width` (a power of
// two). All 32 lanes call.
PBS_DEVICE float SumLanes(float value, int width) {
  for (int mask = 1; mask < width; mask *= 2) value += ShuffleXor(value, mask);
  return value;
}

}  // namespace pbs::cuda
