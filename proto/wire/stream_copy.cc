#include "proto/wire/stream_copy.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace pbs::wire {

#if defined(__x86_64__)

void StreamCopy(std::byte* target, const std::byte* source, size_t size) {
  constexpr size_t kLine = 64;  // bytes; half-written lines would go to memory twice
  const size_t head =
      std::min(size, -reinterpret_cast<uintptr_t>(target) & (kLine - 1));
  std::memcpy(target, source, head);
  target += head;
  source += head;
  size -= head;
  for (; size >= kLine; size -= kLine, target += kLine, source += kLine) {
    const auto* from = reinterpret_cast<const __m128i*>(source);
    auto* to = reinterpret_cast<__m128i*>(target);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1),
                  c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  std::memcpy(target, source, size);
  _mm_sfence();  // streamed stores are not ordered with those that follow
}

#else

void StreamCopy(std::byte* target, const std::byte* source, size_t size) {
  std::memcpy(target, source, size);
}

#endif

}  // namespace pbs::wire
