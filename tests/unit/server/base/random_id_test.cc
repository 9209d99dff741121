// Spec: server/base/random_id.h.
#include "server/base/random_id.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>

namespace pbs::server {
namespace {

TEST(RandomId, HandlesAre32HexDigitsAndDiffer) {
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) {
    const std::string handle = RandomHandle();
    ASSERT_EQ(handle.size(), 32u);
    ASSERT_EQ(handle.find_first_not_of("0123456789abcdef"), std::string::npos);
    ASSERT_TRUE(seen.insert(handle).second);
  }
}

TEST(RandomId, NumbersAreNeverZeroAndDiffer) {
  const uint64_t first = RandomU64();
  const uint64_t second = RandomU64();
  EXPECT_NE(first, 0u);
  EXPECT_NE(first, second);
}

}  // namespace
}  // namespace pbs::server
