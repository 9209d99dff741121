#include "server/transfer/finite_scan.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace pbs::server {
namespace {

// An exponent of all ones is NaN or infinity: adding its lowest bit carries into the
// sign. Blocks of constant length are tested whole, without a branch per element, so
// that the loop vectorises; only a hit, and the rest, is searched element by element.
template <class Word>
std::optional<int64_t> FirstWithExponent(const Word* words, int64_t count,
                                         Word exponent) {
  constexpr int64_t kBlock = 1024;
  constexpr Word kSign = Word{1} << (8 * sizeof(Word) - 1);
  const Word lowest = exponent & static_cast<Word>(-exponent);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    if (count - begin >= kBlock) {
      Word carries = 0;
      for (int64_t i = begin; i < begin + kBlock; ++i) {
        carries |= static_cast<Word>((words[i] & exponent) + lowest);
      }
      if ((carries & kSign) == 0) continue;
    }
    const int64_t end = std::min(begin + kBlock, count);
    for (int64_t i = begin; i < end; ++i) {
      if ((words[i] & exponent) == exponent) return i;
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<int64_t> FirstNonFinite(std::span<const std::byte> bytes, DType dtype) {
  const int64_t count = static_cast<int64_t>(bytes.size()) / DTypeBytes(dtype);
  if (dtype == DType::kF32) {
    return FirstWithExponent(reinterpret_cast<const uint32_t*>(bytes.data()), count,
                             uint32_t{0x7F800000});
  }
  const uint16_t exponent = dtype == DType::kF16 ? 0x7C00 : 0x7F80;
  return FirstWithExponent(reinterpret_cast<const uint16_t*>(bytes.data()), count,
                           exponent);
}

}  // namespace pbs::server
