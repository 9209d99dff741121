// Spec: proto/wire/crc32c.h.
#include "proto/wire/crc32c.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <random>
#include <span>
#include <string_view>
#include <vector>

#include "tests/support/case_name.h"

namespace pbs::wire {
namespace {

std::span<const std::byte> AsBytes(std::string_view text) {
  return std::as_bytes(std::span(text));
}

std::vector<std::byte> RandomBytes(size_t size, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(rng());
  return bytes;
}

constexpr std::array kWays = {CrcWay::kTables, CrcWay::kInstruction, CrcWay::kProducts};

struct KnownCase {
  const char* name;
  std::vector<std::byte> bytes;
  uint32_t crc;
};

std::vector<std::byte> Sequence(int first, int step) {
  std::vector<std::byte> bytes(32);
  for (int i = 0; i < 32; ++i) bytes[i] = static_cast<std::byte>(first + step * i);
  return bytes;
}

class KnownCrcSpec : public testing::TestWithParam<KnownCase> {};

TEST_P(KnownCrcSpec, EqualsThePublishedValue) {
  EXPECT_EQ(Crc32c(GetParam().bytes), GetParam().crc);
  for (const CrcWay way : kWays) {
    if (!Runs(way)) continue;
    EXPECT_EQ(ExtendCrc32cBy(way, 0, GetParam().bytes), GetParam().crc);
  }
}

// RFC 3720, appendix B.4, and the check value of the CRC catalogue.
INSTANTIATE_TEST_SUITE_P(
    Cases, KnownCrcSpec,
    testing::Values(KnownCase{"empty", {}, 0},
                    KnownCase{"zeros", Sequence(0, 0), 0x8A9136AA},
                    KnownCase{"ones", Sequence(0xFF, 0), 0x62A8AB43},
                    KnownCase{"rising", Sequence(0, 1), 0x46DD794E},
                    KnownCase{"falling", Sequence(31, -1), 0x113FDB5C},
                    KnownCase{
                        "check_digits",
                        {AsBytes("123456789").begin(), AsBytes("123456789").end()},
                        0xE3069283}),
    testing_support::CaseName());

TEST(Crc32cSpec, EveryWayAgreesOnEveryLengthAroundItsBlocks) {
  const std::vector<std::byte> bytes = RandomBytes(3 * 4096 * 2 + 64, 1);
  const std::span<const std::byte> all(bytes);
  for (size_t begin : {0, 1, 7}) {
    for (size_t size :
         {0,    1,    7,    8,    9,     511,   512,   513,   767,   768,   769,
          1023, 1024, 1536, 4095, 12287, 12288, 12289, 13056, 24576, 24577, 24600}) {
      const auto part = all.subspan(begin, size);
      const uint32_t right = ExtendCrc32cBy(CrcWay::kTables, 7, part);
      EXPECT_EQ(ExtendCrc32c(7, part), right) << "begin " << begin << " size " << size;
      for (const CrcWay way : kWays) {
        if (!Runs(way)) continue;
        EXPECT_EQ(ExtendCrc32cBy(way, 7, part), right)
            << "way " << static_cast<int>(way) << " begin " << begin << " size "
            << size;
      }
    }
  }
}

TEST(Crc32cSpec, MayBeComputedPieceByPiece) {
  const std::vector<std::byte> bytes = RandomBytes(50'000, 2);
  const std::span<const std::byte> all(bytes);
  const uint32_t whole = Crc32c(all);
  for (size_t cut : {size_t{0}, size_t{1}, size_t{12'289}, bytes.size()}) {
    EXPECT_EQ(ExtendCrc32c(Crc32c(all.first(cut)), all.subspan(cut)), whole)
        << "cut " << cut;
  }
}

TEST(Crc32cSpec, EveryFlippedBitOfAChunkChangesIt) {
  std::vector<std::byte> bytes = RandomBytes(100, 3);
  const uint32_t good = Crc32c(bytes);
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    const auto mask = static_cast<std::byte>(1 << bit % 8);
    bytes[bit / 8] ^= mask;
    EXPECT_NE(Crc32c(bytes), good) << "bit " << bit;
    bytes[bit / 8] ^= mask;
  }
}

TEST(LayerDigestSpec, IsTheCrcOfTheChunkCrcsInLittleEndianOrder) {
  LayerDigest digest;
  digest.Add(0x04030201);
  digest.Add(0x08070605);
  EXPECT_EQ(digest.value(), Crc32c(AsBytes("\x01\x02\x03\x04\x05\x06\x07\x08")));
}

TEST(LayerDigestSpec, SeesMissingDoubledAndSwappedChunks) {
  const auto digest_of = [](std::initializer_list<uint32_t> crcs) {
    LayerDigest digest;
    for (uint32_t crc : crcs) digest.Add(crc);
    return digest.value();
  };
  const uint32_t good = digest_of({1, 2, 3});
  EXPECT_NE(digest_of({1, 3}), good);
  EXPECT_NE(digest_of({1, 2, 2, 3}), good);
  EXPECT_NE(digest_of({2, 1, 3}), good);
}

}  // namespace
}  // namespace pbs::wire
