// Spec: server/model/safetensors.h.
#include "server/model/safetensors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "tests/support/case_name.h"
#include "tests/support/model_folder.h"

namespace pbs {
namespace {

using testing_support::RawSafetensors;

// Parses a whole file as the checkpoint reader does.
StatusOr<std::vector<TensorInfo>> Parse(std::string_view file) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(file.data());
  const auto size = static_cast<int64_t>(file.size());
  PBS_ASSIGN_OR_RETURN(
      const int64_t length,
      ParseSafetensorsLength({bytes, std::min<size_t>(file.size(), 8)}, size));
  return ParseSafetensorsHeader(file.substr(8, static_cast<size_t>(length)), size);
}

std::string Entry(const char* dtype, const char* shape, const char* offsets) {
  return std::string("{\"dtype\":\"") + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

// A file of `data_bytes` zeros with one tensor "a".
std::string One(const char* dtype, const char* shape, const char* offsets,
                size_t data_bytes = 64) {
  return RawSafetensors("{\"a\":" + Entry(dtype, shape, offsets) + "}",
                        std::string(data_bytes, '\0'));
}

std::string Two(const char* first_offsets, const char* second_offsets,
                size_t data_bytes = 64) {
  return RawSafetensors("{\"a\":" + Entry("F32", "[4]", first_offsets) +
                            ",\"b\":" + Entry("F32", "[4]", second_offsets) + "}",
                        std::string(data_bytes, '\0'));
}

std::string WithLength(uint64_t length) {
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + "{}";
}

struct HostileCase {
  const char* name;
  std::string file;
  const char* message;
};

void PrintTo(const HostileCase& c, std::ostream* out) { *out << c.name; }

class HostileSafetensorsSpec : public testing::TestWithParam<HostileCase> {};

TEST_P(HostileSafetensorsSpec, IsRefusedBySayingWhatIsWrong) {
  const auto parsed = Parse(GetParam().file);
  ASSERT_FALSE(parsed.ok());
  EXPECT_EQ(parsed.status().message(), GetParam().message);
  EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(
    Lengths, HostileSafetensorsSpec,
    testing::Values(
        HostileCase{"empty", "",
                    "the file has 0 bytes, fewer than the 8 of its header's length"},
        HostileCase{"seven_bytes", std::string(7, '\0'),
                    "the file has 7 bytes, fewer than the 8 of its header's length"},
        HostileCase{"length_zero", WithLength(0), "the header does not start with '{'"},
        HostileCase{"length_past_the_file", WithLength(3),
                    "header length 3 exceeds the 2 bytes behind it"},
        HostileCase{"length_past_the_limit", WithLength((16 << 20) + 1),
                    "header length 16777217 exceeds 16777216"},
        HostileCase{"length_of_2_to_63", WithLength(uint64_t{1} << 63),
                    "header length 9223372036854775808 exceeds 16777216"},
        HostileCase{"length_of_all_ones", WithLength(UINT64_MAX),
                    "header length 18446744073709551615 exceeds 16777216"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Text, HostileSafetensorsSpec,
    testing::Values(
        HostileCase{"leading_space", RawSafetensors(" {}", ""),
                    "the header does not start with '{'"},
        HostileCase{"an_array", RawSafetensors("[]", ""),
                    "the header does not start with '{'"},
        HostileCase{"cut_off", RawSafetensors("{\"a\":", ""),
                    "header: is not valid JSON near byte 6"},
        HostileCase{"trailing_nul", RawSafetensors(std::string("{}\0", 3), ""),
                    "header: is not valid JSON near byte 3"},
        HostileCase{"bad_utf8", RawSafetensors("{\"\xff\":1}", ""),
                    "header: is not valid JSON near byte 3"},
        HostileCase{"deep_nesting",
                    RawSafetensors("{\"a\":" + std::string(100'000, '['), ""),
                    "header: is nested deeper than 3"},
        HostileCase{"repeated_tensor",
                    RawSafetensors("{\"a\":" + Entry("F32", "[16]", "[0,64]") +
                                       ",\"a\":" + Entry("I32", "[16]", "[0,64]") + "}",
                                   std::string(64, '\0')),
                    "header: key \"a\" appears twice"},
        HostileCase{"repeated_field",
                    RawSafetensors("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"I32\","
                                   "\"shape\":[16],\"data_offsets\":[0,64]}}",
                                   std::string(64, '\0')),
                    "header: key \"dtype\" appears twice"},
        HostileCase{"unknown_field",
                    RawSafetensors("{\"a\":{\"dtype\":\"F32\",\"shape\":[16],"
                                   "\"data_offsets\":[0,64],\"z\":1}}",
                                   std::string(64, '\0')),
                    "tensor \"a\": unknown field \"z\""},
        HostileCase{"missing_dtype",
                    RawSafetensors("{\"a\":{\"shape\":[16],\"data_offsets\":[0,64]}}",
                                   std::string(64, '\0')),
                    "tensor \"a\": dtype is missing"},
        HostileCase{
            "missing_shape",
            RawSafetensors("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,64]}}",
                           std::string(64, '\0')),
            "tensor \"a\": shape is missing"},
        HostileCase{"missing_offsets",
                    RawSafetensors("{\"a\":{\"dtype\":\"F32\",\"shape\":[16]}}",
                                   std::string(64, '\0')),
                    "tensor \"a\": data_offsets is missing"},
        HostileCase{"tensor_is_a_number", RawSafetensors("{\"a\":1}", ""),
                    "tensor \"a\": is not an object"},
        HostileCase{"nameless",
                    RawSafetensors("{\"\":" + Entry("F32", "[16]", "[0,64]") + "}",
                                   std::string(64, '\0')),
                    "tensor \"\": its name has 0 bytes, outside [1, 512]"},
        HostileCase{"metadata_no_object", RawSafetensors("{\"__metadata__\":1}", ""),
                    "__metadata__ is not an object"},
        HostileCase{"metadata_no_string",
                    RawSafetensors("{\"__metadata__\":{\"x\":1}}", ""),
                    "__metadata__ \"x\" is not a string"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Tensors, HostileSafetensorsSpec,
    testing::Values(
        HostileCase{"unknown_dtype", One("F33", "[16]", "[0,64]"),
                    "tensor \"a\": unknown dtype \"F33\""},
        HostileCase{
            "negative_offset", One("F32", "[16]", "[-64,0]"),
            "tensor \"a\": data_offsets is not a pair of non-negative integers"},
        HostileCase{
            "fractional_offset", One("F32", "[16]", "[0.0,64.0]"),
            "tensor \"a\": data_offsets is not a pair of non-negative integers"},
        HostileCase{
            "three_offsets", One("F32", "[16]", "[0,32,64]"),
            "tensor \"a\": data_offsets is not a pair of non-negative integers"},
        HostileCase{
            "huge_offset", One("F32", "[16]", "[0,18446744073709551615]"),
            "tensor \"a\": data_offsets is not a pair of non-negative integers"},
        HostileCase{"begin_behind_end", One("F32", "[16]", "[64,0]"),
                    "tensor \"a\": data_offsets [64, 0] do not lie in the 64 bytes of "
                    "data"},
        HostileCase{"past_the_end", One("F32", "[32]", "[0,128]"),
                    "tensor \"a\": data_offsets [0, 128] do not lie in the 64 bytes of "
                    "data"},
        HostileCase{
            "shape_asks_for_more", One("F32", "[1000,1000]", "[0,64]"),
            "tensor \"a\": data_offsets span 64 bytes; shape [1000, 1000] of F32 "
            "needs 4000000"},
        HostileCase{
            "shape_overflows", One("F32", "[8589934592,8589934592]", "[0,64]"),
            "tensor \"a\": shape \"[8589934592,8589934592]\" overflows 64 bits"},
        HostileCase{
            "shape_wraps_to_zero", One("F32", "[4294967296,4294967296]", "[0,0]", 0),
            "tensor \"a\": shape \"[4294967296,4294967296]\" overflows 64 bits"},
        HostileCase{"zero_dimension", One("F32", "[0,5]", "[0,0]", 0),
                    "tensor \"a\": shape holds \"0\", not a positive integer"},
        HostileCase{"negative_dimension", One("F32", "[-4,-4]", "[0,64]"),
                    "tensor \"a\": shape holds \"-4\", not a positive integer"},
        HostileCase{"string_dimension", One("F32", "[\"16\"]", "[0,64]"),
                    "tensor \"a\": shape holds \"\"16\"\", not a positive integer"},
        HostileCase{"nine_dimensions", One("F32", "[1,1,1,1,1,1,1,1,16]", "[0,64]"),
                    "tensor \"a\": shape has 9 dimensions, more than 8"},
        HostileCase{"same_bytes_twice", Two("[0,16]", "[0,16]", 16),
                    "tensor \"b\": overlaps the one before it by 16 bytes"},
        HostileCase{"overlap", Two("[0,16]", "[8,24]", 24),
                    "tensor \"b\": overlaps the one before it by 8 bytes"},
        HostileCase{"hole", Two("[0,16]", "[48,64]"),
                    "tensor \"b\": leaves a hole of 32 bytes before it"},
        HostileCase{"hole_at_the_start", One("F32", "[4]", "[48,64]"),
                    "tensor \"a\": leaves a hole of 48 bytes before it"},
        HostileCase{"bytes_behind_the_last", One("F32", "[4]", "[0,16]"),
                    "48 bytes after the last tensor belong to no tensor"}),
    testing_support::CaseName());

TEST(SafetensorsSpec, ReadsTensorsInOrderOfNamesWhereverTheyLie) {
  const std::string header = "{\"__metadata__\":{\"format\":\"pt\"},\"w\":" +
                             Entry("BF16", "[2,3]", "[4,16]") +
                             ",\"b\":" + Entry("F32", "[1]", "[0,4]") + "}   ";
  const auto tensors = Parse(RawSafetensors(header, std::string(16, '\0')));
  ASSERT_TRUE(tensors.ok()) << tensors.status().ToString();
  ASSERT_EQ(tensors->size(), 2u);
  const int64_t data = 8 + static_cast<int64_t>(header.size());
  EXPECT_EQ((*tensors)[0].name, "b");
  EXPECT_EQ((*tensors)[0].begin, data);
  EXPECT_EQ((*tensors)[1].name, "w");
  EXPECT_EQ((*tensors)[1].dtype, DType::kBF16);
  EXPECT_EQ((*tensors)[1].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ((*tensors)[1].begin, data + 4);
  EXPECT_EQ((*tensors)[1].bytes, 12);
}

TEST(SafetensorsSpec, AcceptsMisalignedDataScalarsAndDTypesItCannotCompute) {
  const std::string header = "{\"u\":" + Entry("U8", "[1]", "[0,1]") +
                             ",\"f\":" + Entry("F32", "[]", "[1,5]") + "}";
  const auto tensors = Parse(RawSafetensors(header, std::string(5, '\0')));
  ASSERT_TRUE(tensors.ok()) << tensors.status().ToString();
  EXPECT_EQ((*tensors)[0].bytes, 4);
  EXPECT_FALSE((*tensors)[1].dtype.has_value());
}

TEST(SafetensorsSpec, AcceptsAFileWithoutTensors) {
  const auto tensors = Parse(RawSafetensors("{}", ""));
  ASSERT_TRUE(tensors.ok());
  EXPECT_TRUE(tensors->empty());
}

}  // namespace
}  // namespace pbs
