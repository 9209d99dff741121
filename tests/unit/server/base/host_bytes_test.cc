// Spec: server/base/host_bytes.h.
#include "server/base/host_bytes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "server/base/process.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

struct SizeCase {
  const char* name;
  int64_t size;
};

class HostBytesSpec : public testing::TestWithParam<SizeCase> {};

TEST_P(HostBytesSpec, IsAlignedZeroFilledAndWritable) {
  auto bytes = HostBytes::Allocate(GetParam().size);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(bytes->size(), GetParam().size);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(bytes->data()) % HostBytes::kAlignment, 0u);
  const auto span = bytes->span();
  EXPECT_TRUE(std::all_of(span.begin(), span.end(),
                          [](std::byte b) { return b == std::byte(0); }));
  std::memset(bytes->data(), 0xAB, span.size());
}

TEST_P(HostBytesSpec, MovingLeavesTheSourceEmpty) {
  HostBytes source = *HostBytes::Allocate(GetParam().size);
  const std::byte* data = source.data();
  HostBytes target = std::move(source);
  EXPECT_EQ(target.data(), data);
  EXPECT_EQ(target.size(), GetParam().size);
  EXPECT_TRUE(source.empty());  // NOLINT(bugprone-use-after-move): the promise
  EXPECT_EQ(source.data(), nullptr);
}

INSTANTIATE_TEST_SUITE_P(Sizes, HostBytesSpec,
                         testing::Values(SizeCase{"one", 1}, SizeCase{"odd", 100},
                                         SizeCase{"below_mapped",
                                                  HostBytes::kMappedMin - 1},
                                         SizeCase{"mapped", HostBytes::kMappedMin},
                                         SizeCase{"large", (8 << 20) + 1}),
                         testing_support::CaseName());

TEST(HostBytes, ZeroBytesAreEmpty) {
  auto bytes = HostBytes::Allocate(0);
  ASSERT_TRUE(bytes.ok());
  EXPECT_TRUE(bytes->empty());
  EXPECT_EQ(bytes->data(), nullptr);
}

TEST(HostBytes, WhatTheSystemCannotGiveIsAnError) {
  const auto bytes = HostBytes::Allocate(std::numeric_limits<int64_t>::max() / 2);
  EXPECT_EQ(bytes.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(bytes.status().message(),
            "the system refused 4611686018427387903 bytes of memory");
}

TEST(HostBytes, FreeingALargeBlockGivesItsPagesBackAtOnce) {
  constexpr int64_t kSize = 64 << 20;
  HostBytes bytes = *HostBytes::Allocate(kSize);
  std::memset(bytes.data(), 1, kSize);
  const int64_t before = ResidentBytes();
  bytes.Reset();
  EXPECT_LE(ResidentBytes(), before - kSize * 9 / 10);
}

}  // namespace
}  // namespace pbs::server
