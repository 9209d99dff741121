#include "proto/wire/crc32c.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pbs::wire {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr uint32_t kPolynomial = 0x82F63B78u;  // Castagnoli, bits reversed

// tables[k][b]: the CRC register after byte b and then k zero bytes.
constexpr std::array<std::array<uint32_t, 256>, 8> MakeByteTables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    }
    tables[0][byte] = crc;
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (size_t k = 1; k < 8; ++k) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = tables[0][before & 0xFF] ^ (before >> 8);
    }
  }
  return tables;
}

constexpr auto kByteTables = MakeByteTables();

uint64_t Load64(const std::byte* data) {
  uint64_t value;
  std::memcpy(&value, data, sizeof(value));
  return value;
}

// `state` is the raw register: the CRC with all bits flipped.
uint32_t UpdatePortable(uint32_t state, const std::byte* data, size_t size) {
  for (; size >= 8; size -= 8, data += 8) {
    const uint64_t word = Load64(data) ^ state;
    state = 0;
    for (size_t k = 0; k < 8; ++k) {
      state ^= kByteTables[7 - k][(word >> (8 * k)) & 0xFF];
    }
  }
  for (; size > 0; --size, ++data) {
    state =
        kByteTables[0][(state ^ static_cast<uint32_t>(*data)) & 0xFF] ^ (state >> 8);
  }
  return state;
}

#if defined(__x86_64__)

// A linear map of the 32 register bits: column i is the image of bit i.
using BitMatrix = std::array<uint32_t, 32>;

constexpr uint32_t Apply(const BitMatrix& matrix, uint32_t state) {
  uint32_t result = 0;
  for (size_t i = 0; i < 32; ++i) {
    if (((state >> i) & 1) != 0) result ^= matrix[i];
  }
  return result;
}

// What a number of zero bytes does to the register, as a table per register byte.
using SkipTables = std::array<std::array<uint32_t, 256>, 4>;

constexpr SkipTables MakeSkipTables(int log2_bytes) {
  BitMatrix matrix{};
  for (uint32_t i = 0; i < 32; ++i) {
    const uint32_t bit = 1u << i;
    matrix[i] = kByteTables[0][bit & 0xFF] ^ (bit >> 8);
  }
  for (int step = 0; step < log2_bytes; ++step) {
    BitMatrix squared{};
    for (size_t i = 0; i < 32; ++i) squared[i] = Apply(matrix, matrix[i]);
    matrix = squared;
  }
  SkipTables tables{};
  for (uint32_t k = 0; k < 4; ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      tables[k][byte] = Apply(matrix, byte << (8 * k));
    }
  }
  return tables;
}

uint32_t Skip(const SkipTables& tables, uint32_t state) {
  return tables[0][state & 0xFF] ^ tables[1][(state >> 8) & 0xFF] ^
         tables[2][(state >> 16) & 0xFF] ^ tables[3][state >> 24];
}

// The instruction takes 3 cycles and one may start in each, so three neighbouring
// streams run at once; registers are linear, so the first two join by skipping. Takes
// as many whole threes as there are off `data` and `size`.
template <int kLog2StreamBytes>
__attribute__((target("sse4.2"))) uint32_t UpdateThrees(uint32_t state,
                                                        const std::byte*& data,
                                                        size_t& size) {
  constexpr size_t kStreamBytes = size_t{1} << kLog2StreamBytes;
  static constexpr SkipTables kSkipStream = MakeSkipTables(kLog2StreamBytes);
  for (; size >= 3 * kStreamBytes; size -= 3 * kStreamBytes) {
    uint64_t first = state, second = 0, third = 0;
    for (const std::byte* end = data + kStreamBytes; data < end; data += 8) {
      first = _mm_crc32_u64(first, Load64(data));
      second = _mm_crc32_u64(second, Load64(data + kStreamBytes));
      third = _mm_crc32_u64(third, Load64(data + 2 * kStreamBytes));
    }
    state =
        Skip(kSkipStream, static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
    state = Skip(kSkipStream, state) ^ static_cast<uint32_t>(third);
    data += 2 * kStreamBytes;
  }
  return state;
}

// Long streams for what lies in one piece, short ones for what is left of it and for
// payloads that arrive in small pieces.
__attribute__((target("sse4.2"))) uint32_t UpdateSse42(uint32_t state,
                                                       const std::byte* data,
                                                       size_t size) {
  state = UpdateThrees<12>(state, data, size);
  state = UpdateThrees<8>(state, data, size);
  for (; size >= 8; size -= 8, data += 8) {
    state = static_cast<uint32_t>(_mm_crc32_u64(state, Load64(data)));
  }
  for (; size > 0; --size, ++data) {
    state = _mm_crc32_u8(state, static_cast<uint8_t>(*data));
  }
  return state;
}

// x^exponent modulo the polynomial, bits reversed, as a factor of carry-less products
// of reversed numbers, which come out one bit short.
constexpr int64_t FoldFactor(int exponent) {
  uint32_t power = 1;  // bit i is x^i
  constexpr uint32_t kPlainPolynomial = 0x1EDC6F41u;
  for (int i = 0; i < exponent; ++i) {
    power = (power << 1) ^ ((power >> 31) != 0 ? kPlainPolynomial : 0);
  }
  uint64_t reversed = 0;
  for (int bit = 0; bit < 32; ++bit)
    reversed |= uint64_t{power >> bit & 1} << (31 - bit);
  return static_cast<int64_t>(reversed << 1);
}

// Factors that move 128 bits ahead by `bits`: of the earlier and of the later half.
constexpr int64_t FoldEarlier(int bits) { return FoldFactor(bits + 32); }
constexpr int64_t FoldLater(int bits) { return FoldFactor(bits - 32); }

#define PBS_CRC_FOLDING \
  __attribute__((target("sse4.2,pclmul,avx512f,avx512dq,vpclmulqdq")))

// `from` moved ahead by the distance of `factors`, onto `onto`.
PBS_CRC_FOLDING __m512i Fold(__m512i from, __m512i factors, __m512i onto) {
  constexpr int kXorOfThree = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(from, factors, 0x00),
                                   _mm512_clmulepi64_epi128(from, factors, 0x11), onto,
                                   kXorOfThree);
}

template <int kBits>
PBS_CRC_FOLDING __m512i Factors() {
  constexpr int64_t a = FoldEarlier(kBits), b = FoldLater(kBits);
  return _mm512_set_epi64(b, a, b, a, b, a, b, a);
}

// The line at source + at. With kStreams it also goes to target + at, past the caches.
template <bool kStreams>
PBS_CRC_FOLDING __m512i Take(const std::byte* source,
                             [[maybe_unused]] std::byte* target, size_t at) {
  __m512i line = _mm512_loadu_si512(source + at);
  if constexpr (kStreams) {
    asm volatile("" : "+v"(line));  // the compiler cannot load it again
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), line);
  }
  return line;
}

// Carry-less products of 64 bits, eight at once (V. Gopal et al., "Fast CRC Computation
// for Generic Polynomials Using PCLMULQDQ Instruction", 2009): four blocks of 64 bytes
// are moved ahead by 256 bytes, again and again, which leaves the remainder as it is.
// The last 16 bytes go through the CRC instruction. Takes whole blocks of 256 bytes
// off; with kStreams it copies them to `target`, which is aligned to 64 bytes.
template <bool kStreams>
PBS_CRC_FOLDING uint32_t UpdateFolding(uint32_t state, std::byte*& target,
                                       const std::byte*& source, size_t& size) {
  constexpr size_t kStride = 256;
  if (size < 2 * kStride) return state;
  const auto advance = [&] {
    source += kStride;
    if constexpr (kStreams) target += kStride;
    size -= kStride;
  };
  const __m512i ahead_256 = Factors<2048>(), ahead_64 = Factors<512>();
  __m512i a = _mm512_xor_si512(
      Take<kStreams>(source, target, 0),
      _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  __m512i b = Take<kStreams>(source, target, 64);
  __m512i c = Take<kStreams>(source, target, 128);
  __m512i d = Take<kStreams>(source, target, 192);
  advance();
  while (size >= kStride) {
    a = Fold(a, ahead_256, Take<kStreams>(source, target, 0));
    b = Fold(b, ahead_256, Take<kStreams>(source, target, 64));
    c = Fold(c, ahead_256, Take<kStreams>(source, target, 128));
    d = Fold(d, ahead_256, Take<kStreams>(source, target, 192));
    advance();
  }
  d = Fold(Fold(Fold(a, ahead_64, b), ahead_64, c), ahead_64, d);

  // The four parts of d move onto its last one, each by its distance.
  constexpr int64_t a3 = FoldEarlier(384), b3 = FoldLater(384), a2 = FoldEarlier(256),
                    b2 = FoldLater(256), a1 = FoldEarlier(128), b1 = FoldLater(128);
  const __m512i to_last = _mm512_set_epi64(0, 0, b1, a1, b2, a2, b3, a3);
  const __m512i moved =
      Fold(d, to_last, _mm512_maskz_mov_epi64(0xC0, d));  // the last part stays
  alignas(64) std::array<uint64_t, 8> parts;
  _mm512_store_si512(parts.data(), moved);
  uint64_t rest = _mm_crc32_u64(0, parts[0] ^ parts[2] ^ parts[4] ^ parts[6]);
  rest = _mm_crc32_u64(rest, parts[1] ^ parts[3] ^ parts[5] ^ parts[7]);
  return static_cast<uint32_t>(rest);
}

#undef PBS_CRC_FOLDING

// Loads a word that is then only in a register: the compiler cannot load it again.
uint64_t LoadOnce(const std::byte* data) {
  uint64_t word = Load64(data);
  asm volatile("" : "+r"(word));
  return word;
}

void StreamWord(std::byte* target, uint64_t word) {
  _mm_stream_si64(reinterpret_cast<long long*>(target),  // NOLINT: the type of the call
                  static_cast<long long>(word));         // NOLINT
}

// As UpdateThrees(), of the words that it stores past the caches.
template <int kLog2StreamBytes>
__attribute__((target("sse4.2"))) uint32_t StreamThrees(uint32_t state,
                                                        std::byte*& target,
                                                        const std::byte*& source,
                                                        size_t& size) {
  constexpr size_t kStreamBytes = size_t{1} << kLog2StreamBytes;
  static constexpr SkipTables kSkipStream = MakeSkipTables(kLog2StreamBytes);
  for (; size >= 3 * kStreamBytes; size -= 3 * kStreamBytes) {
    uint64_t first = state, second = 0, third = 0;
    for (size_t at = 0; at < kStreamBytes; at += 8) {
      const uint64_t a = LoadOnce(source + at);
      const uint64_t b = LoadOnce(source + kStreamBytes + at);
      const uint64_t c = LoadOnce(source + 2 * kStreamBytes + at);
      StreamWord(target + at, a);
      StreamWord(target + kStreamBytes + at, b);
      StreamWord(target + 2 * kStreamBytes + at, c);
      first = _mm_crc32_u64(first, a);
      second = _mm_crc32_u64(second, b);
      third = _mm_crc32_u64(third, c);
    }
    state =
        Skip(kSkipStream, static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
    state = Skip(kSkipStream, state) ^ static_cast<uint32_t>(third);
    source += 3 * kStreamBytes;
    target += 3 * kStreamBytes;
  }
  return state;
}

// Takes off what it has copied; the rest is short.
uint32_t StreamMost(CrcWay way, uint32_t state, std::byte*& target,
                    const std::byte*& source, size_t& size) {
  constexpr size_t kLine = 64;  // bytes; half-written lines would go to memory twice
  if (way == CrcWay::kTables) return state;
  const size_t head =
      std::min(size, -reinterpret_cast<uintptr_t>(target) & (kLine - 1));
  std::memcpy(target, source, head);
  state = UpdateSse42(state, target, head);
  target += head;
  source += head;
  size -= head;
  if (way == CrcWay::kProducts)
    state = UpdateFolding<true>(state, target, source, size);
  state = StreamThrees<12>(state, target, source, size);
  state = StreamThrees<8>(state, target, source, size);
  _mm_sfence();  // streamed stores are not ordered with those that follow
  return state;
}

#else

uint32_t StreamMost(CrcWay, uint32_t state, std::byte*&, const std::byte*&, size_t&) {
  return state;
}

#endif

CrcWay FindBestWay() {
  for (const CrcWay way : {CrcWay::kProducts, CrcWay::kInstruction}) {
    if (Runs(way)) return way;
  }
  return CrcWay::kTables;
}

CrcWay BestWay() {
  static const CrcWay way = FindBestWay();
  return way;
}

uint32_t Update(CrcWay way, uint32_t state, const std::byte* data, size_t size) {
#if defined(__x86_64__)
  if (way == CrcWay::kProducts) {
    std::byte* nowhere = nullptr;
    state = UpdateFolding<false>(state, nowhere, data, size);
  }
  if (way != CrcWay::kTables) return UpdateSse42(state, data, size);
#endif
  (void)way;
  return UpdatePortable(state, data, size);
}

}  // namespace

bool Runs(CrcWay way) {
  if (way == CrcWay::kTables) return true;
#if defined(__x86_64__)
  const bool instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (way == CrcWay::kInstruction) return instruction;
  return instruction && __builtin_cpu_supports("pclmul") != 0 &&
         __builtin_cpu_supports("avx512f") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 &&
         __builtin_cpu_supports("vpclmulqdq") != 0;
#else
  return false;
#endif
}

uint32_t ExtendCrc32c(uint32_t crc, std::span<const std::byte> bytes) {
  return ExtendCrc32cBy(BestWay(), crc, bytes);
}

uint32_t ExtendCrc32cBy(CrcWay way, uint32_t crc, std::span<const std::byte> bytes) {
  return ~Update(way, ~crc, bytes.data(), bytes.size());
}

uint32_t CopyCrc32c(uint32_t crc, std::byte* target, std::span<const std::byte> source,
                    bool streamed) {
  return CopyCrc32cBy(BestWay(), crc, target, source, streamed);
}

uint32_t CopyCrc32cBy(CrcWay way, uint32_t crc, std::byte* target,
                      std::span<const std::byte> source, bool streamed) {
  constexpr size_t kPieceBytes = 64 << 10;  // still in the caches after it is copied
  const std::byte* from = source.data();
  size_t size = source.size();
  uint32_t state = ~crc;
  if (streamed) state = StreamMost(way, state, target, from, size);
  while (size > 0) {
    const size_t piece = std::min(size, kPieceBytes);
    std::memcpy(target, from, piece);
    state = Update(way, state, target, piece);
    target += piece;
    from += piece;
    size -= piece;
  }
  return ~state;
}

void LayerDigest::Add(uint32_t chunk_crc) {
  std::array<std::byte, 4> bytes;
  for (size_t i = 0; i < 4; ++i)
    bytes[i] = static_cast<std::byte>(chunk_crc >> (8 * i));
  crc_ = ExtendCrc32c(crc_, bytes);
}

}  // namespace pbs::wire
