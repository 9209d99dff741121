// Spec: server/model/fp8.h.
#include "server/model/fp8.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "tests/support/case_name.h"
#include "tests/unit/model/tiny_prefill.h"

namespace pbs {
namespace {

using namespace tiny_prefill;  // NOLINT: as in the other tests of this folder
using nlohmann::json;
using testing_support::SafetensorsBytes;
using testing_support::TensorMap;
using testing_support::TestTensor;

TEST(Fp8Spec, BytesAreTheNumbersOfE4M3) {
  EXPECT_EQ(Fp8ToFloat(0x00), 0.0f);
  EXPECT_EQ(Fp8ToFloat(0x80), 0.0f);
  EXPECT_TRUE(std::signbit(Fp8ToFloat(0x80)));
  EXPECT_EQ(Fp8ToFloat(0x01), 0x1p-9f);  // the smallest
  EXPECT_EQ(Fp8ToFloat(0x07), 7 * 0x1p-9f);
  EXPECT_EQ(Fp8ToFloat(0x08), 0x1p-6f);  // the smallest normal one
  EXPECT_EQ(Fp8ToFloat(0x38), 1.0f);
  EXPECT_EQ(Fp8ToFloat(0xBC), -1.5f);
  EXPECT_EQ(Fp8ToFloat(0x7E), 448.0f);  // the largest
  EXPECT_TRUE(std::isnan(Fp8ToFloat(0x7F)));
  EXPECT_TRUE(std::isnan(Fp8ToFloat(0xFF)));
}

uint8_t NearestFp8(float value) {
  uint8_t best = 0;
  for (int bits = 0; bits < 256; ++bits) {
    const float number = Fp8ToFloat(static_cast<uint8_t>(bits));
    if (std::abs(number - value) < std::abs(Fp8ToFloat(best) - value)) {
      best = static_cast<uint8_t>(bits);
    }
  }
  return best;
}

struct Layout {
  const char* name;
  json quantization;
  const char* suffix;
  DType scale_dtype;
  int64_t block_rows;  // 0: all of them
  int64_t block_cols;
  bool flat;  // shape [rows] or [] instead of [rows, 1] or [1]
};

void PrintTo(const Layout& layout, std::ostream* out) { *out << layout.name; }

json Compressed(json weights) {
  weights.update({{"num_bits", 8}, {"type", "float"}, {"symmetric", true}});
  return {{"quant_method", "compressed-tensors"},
          {"format", "float-quantized"},
          {"ignore", {"lm_head"}},
          {"config_groups", {{"group_0", {{"weights", weights}}}}}};
}

// A weight of `layout` and, as it is worth in bf16, the plain one.
struct Pair {
  TestTensor stored, scale, plain;
};

Pair Quantise(const TestTensor& weight, const Layout& layout) {
  const int64_t rows = weight.shape[0];
  const int64_t cols = weight.shape[1];
  const int64_t down = layout.block_rows > 0 ? layout.block_rows : rows;
  const int64_t across = layout.block_cols > 0 ? layout.block_cols : cols;
  const int64_t scales_down = (rows + down - 1) / down;
  const int64_t scales_across = (cols + across - 1) / across;
  Pair pair;
  pair.stored = {.dtype = DType::kF32, .shape = weight.shape, .values = {}};
  pair.stored.stored_dtype = "F8_E4M3";
  pair.scale = {
      .dtype = layout.scale_dtype, .shape = {scales_down, scales_across}, .values = {}};
  if (scales_down * scales_across == 1) pair.scale.shape = {1};
  if (layout.flat) pair.scale.shape.resize(scales_down == 1 ? 0 : 1);
  pair.plain = {.dtype = DType::kBF16, .shape = weight.shape, .values = {}};
  for (int64_t i = 0; i < scales_down * scales_across; ++i) {
    // Different ones, so that one in another's place shows.
    pair.scale.values.push_back(
        ToFloat(ToBf16(0.004f * (1.0f + 0.25f * static_cast<float>(i % 5)))));
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const float scale =
          pair.scale.values[static_cast<size_t>(r / down * scales_across + c / across)];
      const uint8_t byte =
          NearestFp8(weight.values[static_cast<size_t>(r * cols + c)] / scale);
      pair.stored.stored += static_cast<char>(byte);
      pair.plain.values.push_back(ToFloat(ToBf16(Fp8ToFloat(byte) * scale)));
    }
  }
  return pair;
}

class Fp8LayoutSpec : public testing::TestWithParam<Layout> {};

TEST_P(Fp8LayoutSpec, ComputesWhatItsBf16NumbersCompute) {
  TinyModel stored({.model_type = "qwen3", .dtype = DType::kBF16, .seed = 5});
  TinyModel plain = stored;
  stored.config["quantization_config"] = GetParam().quantization;
  for (const auto& [name, tensor] : TensorMap(plain.tensors)) {
    if (!name.ends_with("_proj.weight")) continue;
    const Pair pair = Quantise(tensor, GetParam());
    stored.tensors[name] = pair.stored;
    stored.tensors[name + GetParam().suffix] = pair.scale;
    plain.tensors[name] = pair.plain;
  }
  // Of no meaning to weights that are multiplied as bf16.
  stored.tensors["model.layers.0.self_attn.k_proj.input_scale"] = {
      .dtype = DType::kF32, .shape = {1}, .values = {0.5f}};
  stored.tensors["model.layers.0.self_attn.k_scale"] = {
      .dtype = DType::kF32, .shape = {1}, .values = {0.5f}};
  const auto backend = MakeBackend();
  const auto model = LoadTiny(stored, *backend);
  const auto reference = LoadTiny(plain, *backend);
  ASSERT_NE(model, nullptr);
  const std::vector<int32_t> tokens = RandomTokens(40, 3);
  const auto logits = [&](const Model& of) {
    KvCache cache = MakeCache(of, 40);
    const Prefilled done = Prefill(
        of, {.num_tokens = 40, .attention = kDenseOptions, .logit_rows = AllRows(40)},
        tokens, cache);
    EXPECT_TRUE(done.status.ok()) << done.status.ToString();
    return done.logits;
  };
  EXPECT_EQ(logits(*model), logits(*reference));
  EXPECT_NE(model->digest(), reference->digest());
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, Fp8LayoutSpec,
    testing::Values(
        Layout{"blocks_of_the_model_makers",
               {{"quant_method", "fp8"},
                {"fmt", "e4m3"},
                {"activation_scheme", "dynamic"},
                {"weight_block_size", {16, 32}}},
               "_scale_inv",
               DType::kBF16,
               16,
               32,
               false},
        Layout{"blocks_that_do_not_divide",
               {{"quant_method", "fp8"}, {"weight_block_size", {36, 28}}},
               "_scale_inv",
               DType::kF32,
               36,
               28,
               false},
        Layout{"one_scale",
               {{"quant_method", "fp8"}, {"activation_scheme", "static"}},
               "_scale",
               DType::kF32,
               0,
               0,
               false},
        Layout{"one_scale_without_a_shape",
               {{"quant_method", "fp8"}},
               "_scale",
               DType::kF32,
               0,
               0,
               true},
        Layout{"llm_compressor_tensor", Compressed({{"strategy", "tensor"}}), "_scale",
               DType::kBF16, 0, 0, false},
        Layout{"llm_compressor_channel", Compressed({{"strategy", "channel"}}),
               "_scale", DType::kBF16, 1, 0, false},
        Layout{"llm_compressor_block",
               Compressed({{"strategy", "block"}, {"block_structure", {16, 16}}}),
               "_scale", DType::kF32, 16, 16, false},
        Layout{"fbgemm",
               {{"quant_method", "fbgemm_fp8"}},
               "_scale",
               DType::kF32,
               1,
               0,
               false},
        Layout{"modelopt_rows",
               {{"quant_method", "modelopt"}, {"quant_algo", "FP8"}},
               "_scale",
               DType::kF32,
               1,
               0,
               true}),
    testing_support::CaseName());

struct RefusedCase {
  const char* name;
  json quantization;
  StatusCode code;
  const char* message;  // behind "config.json: quantization_config: "
};

void PrintTo(const RefusedCase& c, std::ostream* out) { *out << c.name; }

class RefusedQuantizationSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedQuantizationSpec, NamesTheMethodAndWhatToDo) {
  json config = TinyModel({}).config;
  config["quantization_config"] = GetParam().quantization;
  const Status status = ParseModelConfig(config.dump()).status();
  EXPECT_EQ(status.code(), GetParam().code);
  std::string expected =
      std::string("config.json: quantization_config: ") + GetParam().message;
  if (GetParam().code == StatusCode::kUnimplemented) {
    expected += "; serve a folder with plain or FP8 (e4m3) weights of this model";
  }
  EXPECT_EQ(status.message(), expected);
}

constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
constexpr StatusCode kUnsupported = StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedQuantizationSpec,
    testing::Values(
        RefusedCase{"gptq",
                    {{"quant_method", "gptq"}, {"bits", 4}},
                    kUnsupported,
                    "quant_method \"gptq\" is not supported: its weights are not FP8"},
        RefusedCase{"awq",
                    {{"quant_method", "awq"}},
                    kUnsupported,
                    "quant_method \"awq\" is not supported: its weights are not FP8"},
        RefusedCase{"bitsandbytes",
                    {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}},
                    kUnsupported,
                    "quant_method \"bitsandbytes\" is not supported: its weights are "
                    "not FP8"},
        RefusedCase{
            "without_a_method", {{"bits", 4}}, kInvalid, "quant_method is missing"},
        RefusedCase{"e5m2",
                    {{"quant_method", "fp8"}, {"fmt", "e5m2"}},
                    kUnsupported,
                    "fmt \"e5m2\" is not supported, only e4m3"},
        RefusedCase{"blocks_of_three",
                    {{"quant_method", "fp8"}, {"weight_block_size", {1, 2, 3}}},
                    kInvalid,
                    "weight_block_size [1,2,3] is not two sizes in [1, 65536]"},
        RefusedCase{"blocks_of_nothing",
                    {{"quant_method", "fp8"}, {"weight_block_size", {0, 128}}},
                    kInvalid,
                    "weight_block_size [0,128] is not two sizes in [1, 65536]"},
        RefusedCase{"modelopt_fp4",
                    {{"quant_method", "modelopt"}, {"quant_algo", "NVFP4"}},
                    kUnsupported,
                    "quant_algo \"NVFP4\" is not supported, only FP8"},
        RefusedCase{
            "packed_int4",
            {{"quant_method", "compressed-tensors"}, {"format", "pack-quantized"}},
            kUnsupported,
            "format \"pack-quantized\" is not supported, only float-quantized"},
        RefusedCase{
            "int8",
            {{"quant_method", "compressed-tensors"},
             {"format", "naive-quantized"},
             {"config_groups",
              {{"group_0", {{"weights", {{"num_bits", 8}, {"type", "int"}}}}}}}},
            kUnsupported,
            "config_groups: group_0: weights: type \"int\" of 8 bits is not "
            "supported"},
        RefusedCase{"groups_of_columns",
                    Compressed({{"strategy", "group"}, {"group_size", 128}}),
                    kUnsupported,
                    "config_groups: group_0: weights: strategy \"group\" is not one of "
                    "tensor, channel, block"},
        RefusedCase{
            "without_groups",
            {{"quant_method", "compressed-tensors"}, {"config_groups", json::object()}},
            kInvalid,
            "config_groups: has no groups"},
        RefusedCase{
            "rotated",
            {{"quant_method", "compressed-tensors"}, {"transform_config", {{"R1", 1}}}},
            kUnsupported,
            "transform_config is not supported"}),
    testing_support::CaseName());

struct BrokenCase {
  const char* name;
  std::function<void(TinyModel&)> change;
  const char* message;  // behind "FOLDER: "
};

void PrintTo(const BrokenCase& c, std::ostream* out) { *out << c.name; }

constexpr const char* kWeight = "model.layers.0.mlp.down_proj.weight";  // [48, 80]

class BrokenFp8Spec : public testing::TestWithParam<BrokenCase> {};

TEST_P(BrokenFp8Spec, IsRefusedByTensor) {
  TinyModel tiny({.dtype = DType::kBF16});
  tiny.config["quantization_config"] = {{"quant_method", "fp8"},
                                        {"weight_block_size", {32, 32}}};
  TestTensor& weight = tiny.tensors[kWeight];
  weight.stored_dtype = "F8_E4M3";
  weight.stored = std::string(48 * 80, '\x38');
  tiny.tensors[std::string(kWeight) + "_scale_inv"] = {
      .dtype = DType::kF32, .shape = {2, 3}, .values = std::vector<float>(6, 0.01f)};
  GetParam().change(tiny);
  const TempFolder folder;
  tiny.Write(folder);
  const Status status = Model::Load(folder.path(), {}, *MakeBackend()).status();
  EXPECT_EQ(status.code(), kInvalid);
  EXPECT_EQ(status.message(), folder.path() + ": " + GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BrokenFp8Spec,
    testing::Values(
        BrokenCase{
            "no_scales",
            [](TinyModel& m) { m.tensors.erase(std::string(kWeight) + "_scale_inv"); },
            "tensor \"model.layers.0.mlp.down_proj.weight\" has dtype F8_E4M3 "
            "and no scales: neither "
            "\"model.layers.0.mlp.down_proj.weight_scale_inv\" nor "
            "\"model.layers.0.mlp.down_proj.weight_scale\" is there"},
        BrokenCase{"scales_of_another_shape",
                   [](TinyModel& m) {
                     m.tensors[std::string(kWeight) + "_scale_inv"].shape = {3, 2};
                   },
                   "tensor \"model.layers.0.mlp.down_proj.weight_scale_inv\" has shape "
                   "[3, 2]; the scales of \"model.layers.0.mlp.down_proj.weight\" "
                   "[48, 80] have shape [1], [48] or [48, 1] or, for blocks of 32 x "
                   "32, [2, 3]"},
        BrokenCase{"blocks_that_the_config_does_not_name",
                   [](TinyModel& m) { m.config.erase("quantization_config"); },
                   "tensor \"model.layers.0.mlp.down_proj.weight_scale_inv\" has shape "
                   "[2, 3]; the scales of \"model.layers.0.mlp.down_proj.weight\" "
                   "[48, 80] have shape [1], [48] or [48, 1]"},
        BrokenCase{"a_weight_that_is_not_a_number",
                   [](TinyModel& m) { m.tensors[kWeight].stored[7] = '\x7f'; },
                   "tensor \"model.layers.0.mlp.down_proj.weight\" has 1 elements that "
                   "are NaN or infinite"},
        BrokenCase{"a_scale_that_is_not_a_number",
                   [](TinyModel& m) {
                     m.tensors[std::string(kWeight) + "_scale_inv"].values[2] =
                         std::nanf("");
                   },
                   "tensor \"model.layers.0.mlp.down_proj.weight_scale_inv\" has 1 "
                   "elements that are NaN or infinite"},
        BrokenCase{"an_embedding",
                   [](TinyModel& m) {
                     m.tensors["model.embed_tokens.weight"].stored_dtype = "F8_E4M3";
                     m.tensors["model.embed_tokens.weight"].stored =
                         std::string(97 * 48, '\x38');
                   },
                   "tensor \"model.embed_tokens.weight\" has dtype F8_E4M3, which is "
                   "not one of F32, F16, BF16"}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs
