#include "proto/wire/crc32c.h"

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

uint32_t Update(uint32_t state, const std::byte* data, size_t size) {
  static const bool has_sse42 = __builtin_cpu_supports("sse4.2") != 0;
  return has_sse42 ? UpdateSse42(state, data, size) : UpdatePortable(state, data, size);
}

#else

uint32_t Update(uint32_t state, const std::byte* data, size_t size) {
  return UpdatePortable(state, data, size);
}

#endif

}  // namespace

uint32_t ExtendCrc32c(uint32_t crc, std::span<const std::byte> bytes) {
  return ~Update(~crc, bytes.data(), bytes.size());
}

uint32_t ExtendCrc32cPortable(uint32_t crc, std::span<const std::byte> bytes) {
  return ~UpdatePortable(~crc, bytes.data(), bytes.size());
}

void LayerDigest::Add(uint32_t chunk_crc) {
  std::array<std::byte, 4> bytes;
  for (size_t i = 0; i < 4; ++i)
    bytes[i] = static_cast<std::byte>(chunk_crc >> (8 * i));
  crc_ = ExtendCrc32c(crc_, bytes);
}

}  // namespace pbs::wire
