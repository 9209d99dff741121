// Spec: proto/wire/region_handover.h.
#include "proto/wire/region_handover.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "tests/support/case_name.h"

namespace pbs::wire {
namespace {

using Record = std::vector<std::byte>;

const RegionRequest kRequest = {.handle = "00112233445566778899aabbccddeeff",
                                .epoch = 0x0123456789abcdef};

template <size_t kSize>
Record ToRecord(const std::array<std::byte, kSize>& bytes) {
  return {bytes.begin(), bytes.end()};
}

TEST(RegionHandoverSpec, ARequestIsReadAsItWasWritten) {
  const Record record = ToRecord(*EncodeRegionRequest(kRequest));
  ASSERT_EQ(record.size(), kRegionRequestBytes);
  EXPECT_EQ(record[0], std::byte{'P'});
  EXPECT_EQ(record[3], std::byte{'R'});
  EXPECT_EQ(record[4], std::byte{1});
  EXPECT_EQ(record[40], std::byte{0xef});
  EXPECT_EQ(record[47], std::byte{0x01});
  const auto read = DecodeRegionRequest(record);
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->handle, kRequest.handle);
  EXPECT_EQ(read->epoch, kRequest.epoch);
}

TEST(RegionHandoverSpec, AHandleOfAnotherLengthHasNoRequest) {
  for (size_t size : {0, 31, 33}) {
    EXPECT_FALSE(EncodeRegionRequest({.handle = std::string(size, 'a')}).has_value());
  }
}

TEST(RegionHandoverSpec, AReplyIsReadAsItWasWritten) {
  for (const RegionReply& reply : {RegionReply{0, uint64_t{1} << 40}, RegionReply{5, 0},
                                   RegionReply{kStatusCodeMax, 7}}) {
    const auto read = DecodeRegionReply(EncodeRegionReply(reply));
    ASSERT_TRUE(read.has_value()) << reply.code;
    EXPECT_EQ(read->code, reply.code);
    EXPECT_EQ(read->bytes, reply.bytes);
  }
}

struct BadCase {
  const char* name;
  std::function<void(Record&)> change;
};

class BadRecordSpec : public testing::TestWithParam<BadCase> {};

TEST_P(BadRecordSpec, IsNoRequestAndNoReply) {
  Record request = ToRecord(*EncodeRegionRequest(kRequest));
  GetParam().change(request);
  EXPECT_FALSE(DecodeRegionRequest(request).has_value());
  Record reply = ToRecord(EncodeRegionReply({.code = 5}));
  GetParam().change(reply);
  EXPECT_FALSE(DecodeRegionReply(reply).has_value());
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BadRecordSpec,
    testing::Values(
        BadCase{"empty", [](Record& r) { r.clear(); }},
        BadCase{"short", [](Record& r) { r.pop_back(); }},
        BadCase{"long", [](Record& r) { r.push_back({}); }},
        BadCase{"other_magic", [](Record& r) { r[0] = std::byte{'p'}; }},
        BadCase{"other_version", [](Record& r) { r[4] = std::byte{2}; }},
        BadCase{"no_hex_and_no_code", [](Record& r) { r[8] = std::byte{'G'}; }},
        BadCase{"big_hex_and_no_zero", [](Record& r) { r[12] = std::byte{'A'}; }}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::wire
