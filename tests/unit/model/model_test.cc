// Spec: server/model/model.h, weights.h and digest.h.
#include "server/model/model.h"

#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <string>

#include "pbs/cpu_backend.h"
#include "tests/support/case_name.h"
#include "tests/support/model_folder.h"

namespace pbs {
namespace {

using testing_support::SafetensorsBytes;
using testing_support::TempFolder;
using testing_support::TestTensor;
using testing_support::TinyModel;
using testing_support::TinyModelSpec;

Backend& SharedBackend() {
  static const std::unique_ptr<Backend> backend =
      *CreateCpuBackend({.num_threads = 2, .compute = ComputePreference::kF32});
  return *backend;
}

StatusOr<std::unique_ptr<Model>> Load(const TinyModel& model, int shards = 1,
                                      const ModelOptions& options = {}) {
  const TempFolder folder;
  model.Write(folder, shards);
  return Model::Load(folder.path(), options, SharedBackend());
}

std::string DigestOf(const TinyModel& model, int shards = 1) {
  const auto loaded = Load(model, shards);
  EXPECT_TRUE(loaded.ok()) << loaded.status().ToString();
  return loaded.ok() ? (*loaded)->digest() : "";
}

struct BrokenCase {
  const char* name;
  std::function<void(TinyModel&)> change;
  const char* message;
};

void PrintTo(const BrokenCase& c, std::ostream* out) { *out << c.name; }

class BrokenModelSpec : public testing::TestWithParam<BrokenCase> {};

TEST_P(BrokenModelSpec, IsRefusedBeforeItsTensorsAreRead) {
  TinyModel model({.tied = true});
  GetParam().change(model);
  const TempFolder folder;
  model.Write(folder);
  int64_t bytes_read = 0;
  const ModelOptions options = {
      .control = {.progress = [&](int64_t done, int64_t) { bytes_read = done; }}};
  const auto loaded = Model::Load(folder.path(), options, SharedBackend());
  ASSERT_FALSE(loaded.ok());
  EXPECT_EQ(
      loaded.status().message(),
      folder.path() + (GetParam().message[0] == '/' ? "" : ": ") + GetParam().message);
  EXPECT_EQ(bytes_read, 0);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BrokenModelSpec,
    testing::Values(
        BrokenCase{"config", [](auto& m) { m.config["vocab_size"] = 0; },
                   "/config.json: vocab_size 0 is outside [1, 2097152]"},
        BrokenCase{
            "missing_tensor",
            [](auto& m) { m.tensors.erase("model.layers.1.mlp.up_proj.weight"); },
            "tensor \"model.layers.1.mlp.up_proj.weight\" is missing"},
        BrokenCase{"missing_head_of_an_untied_model",
                   [](auto& m) { m.config["tie_word_embeddings"] = false; },
                   "tensor \"lm_head.weight\" is missing"},
        BrokenCase{"missing_bias", [](auto& m) { m.config["attention_bias"] = true; },
                   "tensor \"model.layers.0.self_attn.q_proj.bias\" is missing"},
        BrokenCase{"transposed",
                   [](auto& m) {
                     m.tensors["model.layers.0.mlp.down_proj.weight"].shape = {80, 48};
                   },
                   "tensor \"model.layers.0.mlp.down_proj.weight\" has shape [80, 48]; "
                   "the config asks for [48, 80]"},
        BrokenCase{"norm_too_long",
                   [](auto& m) {
                     m.tensors["model.norm.weight"] = m.RandomTensor({49}, 1, 0);
                   },
                   "tensor \"model.norm.weight\" has shape [49]; the config asks for "
                   "[48]"},
        BrokenCase{
            "one_layer_too_many", [](auto& m) { m.config["num_hidden_layers"] = 1; },
            "tensor \"model.layers.1.input_layernorm.weight\" does not belong to "
            "a llama model of 1 layers"},
        BrokenCase{
            "bias_that_the_config_denies",
            [](auto& m) {
              m.tensors["model.layers.0.self_attn.q_proj.bias"] =
                  m.RandomTensor({128}, 0, 1);
            },
            "tensor \"model.layers.0.self_attn.q_proj.bias\" does not belong to a "
            "llama model of 2 layers"},
        BrokenCase{
            "tied_head_that_differs",
            [](auto& m) {
              m.tensors["lm_head.weight"] = m.RandomTensor({97, 48}, 0, 1);
            },
            "tensor \"lm_head.weight\" differs from the embedding, but the config "
            "says tie_word_embeddings true"}),
    testing_support::CaseName());

TEST(ModelSpec, RefusesIntegerWeights) {
  const TempFolder folder;
  TinyModel model({.tied = true});
  model.Write(folder);
  std::string bytes = SafetensorsBytes(model.tensors);
  const std::string name = "\"model.norm.weight\":{\"data_offsets\"";
  const size_t at = bytes.find("\"dtype\":\"F32\"", bytes.find(name));
  bytes.replace(at, 13, "\"dtype\":\"I32\"");
  folder.Write("model.safetensors", bytes);
  EXPECT_EQ(Model::Load(folder.path(), {}, SharedBackend()).status().message(),
            folder.path() +
                ": tensor \"model.norm.weight\" has dtype I32, which is not "
                "one of F32, F16, BF16");
}

TEST(ModelSpec, AcceptsStoredFrequenciesAndARepeatedTiedHead) {
  TinyModel model({.tied = true});
  const std::string plain = DigestOf(model);
  model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] =
      model.RandomTensor({16}, 1, 0);
  model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"];
  EXPECT_EQ(DigestOf(model), plain);
}

TEST(ModelSpec, RefusesAFolderWithoutAConfig) {
  const TempFolder folder;
  const Status status = Model::Load(folder.path(), {}, SharedBackend()).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "cannot open " + folder.File("config.json") +
                                  ": No such file or directory");
}

TEST(ModelSpec, KeepsWeightsInTheirStoredDType) {
  const auto wide = Load(TinyModel({.dtype = DType::kF32}));
  const auto half = Load(TinyModel({.dtype = DType::kBF16}));
  ASSERT_TRUE(wide.ok() && half.ok());
  EXPECT_EQ((*half)->compute_dtype(), DType::kF32);
  EXPECT_EQ((*half)->kv_dtype(), DType::kF32);
  EXPECT_LT((*half)->weight_bytes(), (*wide)->weight_bytes() * 6 / 10);
}

TEST(ModelSpec, TakesTheKvDTypeFromItsOptions) {
  const auto model = Load(TinyModel({}), 1, {.kv_dtype = DType::kF16});
  ASSERT_TRUE(model.ok());
  const KvShape shape = (*model)->kv_shape(10);
  EXPECT_EQ(shape.dtype, DType::kF16);
  EXPECT_EQ(shape.bytes(), 2 * 2 * 2 * 10 * 32 * 2);  // layers, K and V, heads, ...
}

TEST(ModelSpec, ReportsProgressUpToTheLastByte) {
  const TinyModel model({});
  int64_t last_done = 0;
  int64_t last_total = 0;
  const ModelOptions options = {
      .control = {.progress = [&](int64_t done, int64_t total) {
        EXPECT_GT(done, last_done);
        last_done = done;
        last_total = total;
      }}};
  ASSERT_TRUE(Load(model, 3, options).ok());
  int64_t bytes = 0;
  for (const auto& [name, tensor] : model.tensors) {
    bytes += static_cast<int64_t>(tensor.values.size()) * 4;
  }
  EXPECT_EQ(last_done, bytes);
  EXPECT_EQ(last_total, bytes);
}

TEST(ModelSpec, StopsLoadingWhenTold) {
  const std::atomic<bool> stop = true;
  const auto model = Load(TinyModel({}), 1, {.control = {.stop = &stop}});
  EXPECT_EQ(model.status().code(), StatusCode::kCancelled);
  EXPECT_NE(model.status().message().find("loading was stopped after 0 bytes"),
            std::string::npos);
}

TEST(ModelSpec, StopsWhileARepeatedHeadIsCompared) {
  TinyModel tiny({.tied = true});
  tiny.tensors["lm_head.weight"] = tiny.tensors["model.embed_tokens.weight"];
  const std::atomic<bool> stop = true;
  const auto model = Load(tiny, 1, {.control = {.stop = &stop}});
  EXPECT_EQ(model.status().code(), StatusCode::kCancelled);
  EXPECT_NE(model.status().message().find(
                "loading was stopped while \"lm_head.weight\" was compared"),
            std::string::npos);
}

TEST(ModelDigestSpec, HasAPrefixAndThirtyTwoDigits) {
  const std::string digest = DigestOf(TinyModel({}));
  EXPECT_EQ(digest.find("xxh3-128:"), 0u);
  EXPECT_EQ(digest.size(), 9u + 32u);
  EXPECT_EQ(digest.find_first_not_of("0123456789abcdef", 9), std::string::npos);
}

TEST(ModelDigestSpec, DoesNotDependOnShards) {
  const TinyModel model({.model_type = "qwen3"});
  const std::string whole = DigestOf(model, 1);
  EXPECT_EQ(DigestOf(model, 2), whole);
  EXPECT_EQ(DigestOf(model, 7), whole);
}

TEST(ModelDigestSpec, ChangesWithOneBitOfOneWeight) {
  TinyModel model({});
  const std::string before = DigestOf(model);
  float& weight = model.tensors["model.layers.1.mlp.down_proj.weight"].values.back();
  weight = std::bit_cast<float>(std::bit_cast<uint32_t>(weight) ^ 1u);
  EXPECT_NE(DigestOf(model), before);
}

TEST(ModelDigestSpec, ChangesWithTheConfigAndTheStoredDType) {
  TinyModel model({});
  const std::string before = DigestOf(model);
  model.config["rope_theta"] = 20000.0;
  EXPECT_NE(DigestOf(model), before);
  model.config["rope_theta"] = 10000.0;
  EXPECT_EQ(DigestOf(model), before);
  // The same values, stored wider than they need to be.
  TinyModel narrow({.dtype = DType::kBF16});
  TinyModel widened = narrow;
  for (auto& [name, tensor] : widened.tensors) tensor.dtype = DType::kF32;
  EXPECT_NE(DigestOf(narrow), DigestOf(widened));
}

}  // namespace
}  // namespace pbs
