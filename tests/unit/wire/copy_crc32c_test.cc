// Spec: CopyCrc32c() of proto/wire/crc32c.h is a copy with the CRC of the copied bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <span>
#include <vector>

#include "proto/wire/crc32c.h"

namespace pbs::wire {
namespace {

constexpr std::byte kUntouched{0xEE};
constexpr size_t kRoom = 200;

class CopyCrc32cSpec : public testing::TestWithParam<CrcWay> {};

TEST_P(CopyCrc32cSpec, CopiesEveryLengthAndAlignmentAndNothingElse) {
  if (!Runs(GetParam())) GTEST_SKIP() << "the CPU has no such instructions";
  constexpr uint32_t kSeed = 26;
  std::mt19937 rng(kSeed);
  for (size_t size : {0, 1, 7, 63, 64, 65, 767, 768, 1000, 4096, 12287, 12288, 12289,
                      65536, 100'001}) {
    std::vector<std::byte> source(size + kRoom);
    for (std::byte& byte : source) byte = static_cast<std::byte>(rng());
    for (bool streamed : {false, true}) {
      for (size_t shift : {0, 1, 8, 63, 64}) {
        const auto from = std::span<const std::byte>(source).subspan(shift % 9, size);
        std::vector<std::byte> target(size + kRoom, kUntouched);
        const uint32_t crc =
            CopyCrc32cBy(GetParam(), 5, target.data() + shift, from, streamed);
        EXPECT_EQ(crc, ExtendCrc32cBy(CrcWay::kTables, 5, from))
            << size << " bytes, shift " << shift << ", streamed " << streamed
            << ", seed " << kSeed;
        const auto copied = target.begin() + static_cast<ptrdiff_t>(shift);
        const auto end = copied + static_cast<ptrdiff_t>(size);
        const auto is_untouched = [](std::byte byte) { return byte == kUntouched; };
        EXPECT_TRUE(std::equal(copied, end, from.begin()) &&
                    std::all_of(target.begin(), copied, is_untouched) &&
                    std::all_of(end, target.end(), is_untouched))
            << size << " bytes, shift " << shift << ", streamed " << streamed
            << ", seed " << kSeed;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, CopyCrc32cSpec,
                         testing::Values(CrcWay::kTables, CrcWay::kInstruction,
                                         CrcWay::kProducts));

}  // namespace
}  // namespace pbs::wire
