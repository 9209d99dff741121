// Folders as people have them: what is read, what is told, what is refused with advice.
// Spec: server/model/model.h, checkpoint.h, folder_hint.h.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "tests/support/case_name.h"
#include "tests/unit/model/tiny_prefill.h"

namespace pbs {
namespace {

using namespace tiny_prefill;  // NOLINT: as in the other tests of this folder
using testing_support::SafetensorsBytes;
using testing_support::TensorMap;

struct NoModelCase {
  const char* name;
  std::vector<std::string> files;
  const char* hint;  // behind "...: No such file or directory"
};

void PrintTo(const NoModelCase& c, std::ostream* out) { *out << c.name; }

class NoModelSpec : public testing::TestWithParam<NoModelCase> {};

TEST_P(NoModelSpec, IsRefusedWithWhatItIs) {
  const TempFolder folder;
  for (const std::string& file : GetParam().files) folder.Write(file, "{}");
  const Status status = Model::Load(folder.path(), {}, *MakeBackend()).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "cannot open " + folder.File("config.json") +
                                  ": No such file or directory" + GetParam().hint);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, NoModelSpec,
    testing::Values(
        NoModelCase{"empty", {}, ""},
        NoModelCase{
            "lora_adapter",
            {"adapter_model.safetensors", "adapter_config.json"},
            ": adapter_config.json is of a LoRA adapter; merge it into its base "
            "model (merge_and_unload, save_pretrained) and serve that folder"},
        NoModelCase{"gguf",
                    {"llama-q4_k_m.gguf"},
                    ": llama-q4_k_m.gguf is a GGUF file, which is not read; serve the "
                    "safetensors folder"},
        NoModelCase{
            "makers_own_format",
            {"consolidated.00.pth", "params.json", "tokenizer.model"},
            ": consolidated.00.pth is the maker's own format; serve the Hugging "
            "Face folder of this model"},
        NoModelCase{"hub_cache_root",
                    {"snapshots", "refs"},
                    ": snapshots is of a hub cache; name the folder in it that is "
                    "called by a revision"}),
    testing_support::CaseName());

struct NoWeightsCase {
  const char* name;
  std::vector<std::string> files;
  const char* hint;
};

void PrintTo(const NoWeightsCase& c, std::ostream* out) { *out << c.name; }

class NoWeightsSpec : public testing::TestWithParam<NoWeightsCase> {};

TEST_P(NoWeightsSpec, IsRefusedWithWhatToDo) {
  const TempFolder folder;
  folder.Write("config.json", TinyModel({}).config.dump());
  for (const std::string& file : GetParam().files) folder.Write(file, "{}");
  const Status status = Model::Load(folder.path(), {}, *MakeBackend()).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_EQ(status.message(), folder.path() +
                                  " has neither model.safetensors nor "
                                  "model.safetensors.index.json" +
                                  GetParam().hint);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, NoWeightsSpec,
    testing::Values(
        NoWeightsCase{"config_alone", {}, ""},
        NoWeightsCase{
            "pickled",
            {"pytorch_model.bin"},
            ": pytorch_model.bin is another format; convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"},
        NoWeightsCase{
            "pickled_shards",
            {"pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"},
            ": pytorch_model-00001-of-00002.bin is another format; convert it with "
            "transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"},
        NoWeightsCase{"gguf_beside_a_config",
                      {"model-q8_0.gguf"},
                      ": model-q8_0.gguf is a GGUF file, which is not read; serve the "
                      "safetensors folder"},
        NoWeightsCase{"another_name",
                      {"model.fp16.safetensors"},
                      ": model.fp16.safetensors is not read under this name"}),
    testing_support::CaseName());

TEST(ModelFolderSpec, AFileInPlaceOfAFolderIsRefused) {
  const TempFolder folder;
  folder.Write("model.gguf", "GGUF");
  EXPECT_EQ(
      Model::Load(folder.File("model.gguf"), {}, *MakeBackend()).status().message(),
      "cannot open " + folder.File("model.gguf/config.json") +
          ": Not a directory: it is no folder; a model is a folder with config.json "
          "and "
          "safetensors");
}

TEST(ModelFolderSpec, AConfigThatGitLfsHasNotPulledIsRefused) {
  const TempFolder folder;
  folder.Write("config.json", "version https://git-lfs.github.com/spec/v1\noid x\n");
  EXPECT_EQ(Model::Load(folder.path(), {}, *MakeBackend()).status().message(),
            folder.File("config.json") +
                " is a Git LFS pointer, not the file itself: run `git lfs pull` in its "
                "folder");
}

TEST(ModelFolderSpec, EndTokensAreThoseOfBothFiles) {
  const TempFolder folder;
  TinyModel({}).Write(folder);
  folder.Write("generation_config.json", R"({"eos_token_id": [5, 1], "top_p": 0.9})");
  const auto backend = MakeBackend();
  const auto model = Model::Load(folder.path(), {}, *backend);
  ASSERT_TRUE(model.ok()) << model.status().ToString();
  EXPECT_EQ((*model)->config().eos_token_ids, (std::vector<int32_t>{1, 5}));
  folder.Write("generation_config.json", R"({"eos_token_id": 97})");
  EXPECT_EQ(Model::Load(folder.path(), {}, *backend).status().message(),
            folder.File("generation_config.json") +
                ": eos_token_id \"97\" is not a token below vocab_size 97");
}

TEST(ModelFolderSpec, AnIndexMayNameFrequenciesThatNoShardHas) {
  const TempFolder folder;
  TinyModel({}).Write(folder, 2);
  const std::string path = folder.File("model.safetensors.index.json");
  nlohmann::json index = nlohmann::json::parse(std::ifstream(path));
  index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] =
      "part-0.safetensors";
  folder.Write("model.safetensors.index.json", index.dump());
  const auto backend = MakeBackend();
  const auto model = Model::Load(folder.path(), {}, *backend);
  ASSERT_TRUE(model.ok()) << model.status().ToString();
  EXPECT_EQ((*model)->notes(),
            std::vector<std::string>{
                "model.safetensors.index.json names 1 tensors that no shard has; the "
                "first is \"model.layers.0.self_attn.rotary_emb.inv_freq\" in "
                "\"part-0.safetensors\""});
}

TEST(ModelFolderSpec, ATensorThatTheIndexPromisesInVainIsNamedWithItsShard) {
  const TempFolder folder;
  TinyModel tiny({});
  tiny.Write(folder, 2);
  TensorMap without;
  const std::string path = folder.File("model.safetensors.index.json");
  const nlohmann::json index = nlohmann::json::parse(std::ifstream(path));
  const std::string shard = index["weight_map"]["model.norm.weight"];
  for (const auto& [name, tensor] : tiny.tensors) {
    if (index["weight_map"][name] == shard && name != "model.norm.weight") {
      without.emplace(name, tensor);
    }
  }
  folder.Write(shard, SafetensorsBytes(without));
  EXPECT_EQ(Model::Load(folder.path(), {}, *MakeBackend()).status().message(),
            folder.path() +
                ": tensor \"model.norm.weight\" is missing: the index promises it in "
                "\"" +
                shard + "\"");
}

struct NotFiniteCase {
  const char* name;
  DType dtype;
  const char* tensor;
  std::vector<float> values;  // put at the tensor's begin
};

void PrintTo(const NotFiniteCase& c, std::ostream* out) { *out << c.name; }

class NotFiniteSpec : public testing::TestWithParam<NotFiniteCase> {};

TEST_P(NotFiniteSpec, IsRefusedWithTensorAndCount) {
  const NotFiniteCase& c = GetParam();
  TinyModel tiny({.dtype = c.dtype});
  std::copy(c.values.begin(), c.values.end(), tiny.tensors[c.tensor].values.begin());
  const TempFolder folder;
  tiny.Write(folder);
  const Status status = Model::Load(folder.path(), {}, *MakeBackend()).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), folder.path() + ": tensor \"" + c.tensor + "\" has " +
                                  std::to_string(c.values.size()) +
                                  " elements that are NaN or infinite");
}

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

INSTANTIATE_TEST_SUITE_P(
    Cases, NotFiniteSpec,
    testing::Values(
        NotFiniteCase{"f32_nan_in_a_weight",
                      DType::kF32,
                      "model.layers.1.mlp.down_proj.weight",
                      {kNan}},
        NotFiniteCase{"f16_infinities_in_the_embedding",
                      DType::kF16,
                      "model.embed_tokens.weight",
                      {kInf, -kInf, kInf}},
        NotFiniteCase{"bf16_in_the_head", DType::kBF16, "lm_head.weight", {kNan, kInf}},
        NotFiniteCase{"bf16_in_a_norm", DType::kBF16, "model.norm.weight", {-kInf}}),
    testing_support::CaseName());

// The language model of a tiny llama, inside a model with more parts.
TensorMap Renamed(const TensorMap& tensors,
                  const std::function<std::string(const std::string&)>& rename) {
  TensorMap renamed;
  for (const auto& [name, tensor] : tensors) renamed.emplace(rename(name), tensor);
  renamed["vision_tower.patch.weight"] = {
      .dtype = DType::kF32, .shape = {2}, .values = {1, 2}};
  return renamed;
}

struct TextPartCase {
  const char* name;
  std::function<std::string(const std::string&)> rename;
};

void PrintTo(const TextPartCase& c, std::ostream* out) { *out << c.name; }

class TextPartSpec : public testing::TestWithParam<TextPartCase> {};

TEST_P(TextPartSpec, IsTheModelThatItWouldBeAlone) {
  const TinyModel tiny({});
  const auto backend = MakeBackend();
  const std::string alone = LoadTiny(tiny, *backend)->digest();
  const TempFolder folder;
  folder.Write(
      "config.json",
      nlohmann::json{{"model_type", "llava"}, {"text_config", tiny.config}}.dump());
  folder.Write("model.safetensors",
               SafetensorsBytes(Renamed(tiny.tensors, GetParam().rename)));
  const auto model = Model::Load(folder.path(), {}, *backend);
  ASSERT_TRUE(model.ok()) << model.status().ToString();
  EXPECT_EQ((*model)->digest(), alone);
  EXPECT_EQ((*model)->notes(),
            std::vector<std::string>{"config.json: only its text_config is served; 1 "
                                     "tensors of other parts are not read"});
}

INSTANTIATE_TEST_SUITE_P(
    Cases, TextPartSpec,
    testing::Values(TextPartCase{"under_language_model",
                                 [](const std::string& name) {
                                   return "language_model." + name;
                                 }},
                    TextPartCase{"under_model_language_model",
                                 [](const std::string& name) {
                                   return name.starts_with("model.")
                                              ? "model.language_model." + name.substr(6)
                                              : name;
                                 }},
                    TextPartCase{"beside_the_other_parts",
                                 [](const std::string& name) { return name; }}),
    testing_support::CaseName());

TEST(TextPartSpec, OneTensorUnderTwoNamesIsRefused) {
  const TinyModel tiny({});
  TensorMap tensors =
      Renamed(tiny.tensors, [](const std::string& n) { return "language_model." + n; });
  tensors["lm_head.weight"] = tiny.tensors.at("lm_head.weight");
  const TempFolder folder;
  folder.Write(
      "config.json",
      nlohmann::json{{"model_type", "llava"}, {"text_config", tiny.config}}.dump());
  folder.Write("model.safetensors", SafetensorsBytes(tensors));
  EXPECT_EQ(Model::Load(folder.path(), {}, *MakeBackend()).status().message(),
            folder.path() +
                ": two tensors are \"lm_head.weight\" of the text part; one is "
                "\"lm_head.weight\"");
}

}  // namespace
}  // namespace pbs
