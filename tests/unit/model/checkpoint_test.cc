// Spec: server/model/checkpoint.h and file.h, on real files.
#include "server/model/checkpoint.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <ostream>
#include <string>
#include <vector>

#include "tests/support/case_name.h"
#include "tests/support/model_folder.h"

namespace pbs {
namespace {

using testing_support::SafetensorsBytes;
using testing_support::TempFolder;
using testing_support::TensorMap;

TensorMap Tensors(const std::string& name, float value) {
  return {{name, {DType::kF32, {2}, {value, value + 1}}}};
}

struct IndexCase {
  const char* name;
  std::string text;
  const char* message;  // behind "model.safetensors.index.json: "
};

void PrintTo(const IndexCase& c, std::ostream* out) { *out << c.name; }

class ShardIndexSpec : public testing::TestWithParam<IndexCase> {};

TEST_P(ShardIndexSpec, RefusesWhatIsNotAMapToPlainFileNames) {
  EXPECT_EQ(ParseShardIndex(GetParam().text).status().message(),
            std::string("model.safetensors.index.json: ") + GetParam().message);
}

std::string MapTo(const char* file) {
  return std::string("{\"weight_map\":{\"a\":\"") + file + "\"}}";
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ShardIndexSpec,
    testing::Values(
        IndexCase{"no_json", "{", "is not valid JSON near byte 2"},
        IndexCase{"an_array", "[]", "is not an object"},
        IndexCase{"no_map", "{}", "weight_map is missing"},
        IndexCase{"map_is_a_list", "{\"weight_map\":[]}",
                  "weight_map is of type array, not an object"},
        IndexCase{"empty_map", "{\"weight_map\":{}}", "weight_map: has no tensors"},
        IndexCase{"repeated_tensor",
                  "{\"weight_map\":{\"a\":\"x.safetensors\",\"a\":\"y.safetensors\"}}",
                  "key \"a\" appears twice"},
        IndexCase{"number_for_a_name", "{\"weight_map\":{\"a\":1}}",
                  "weight_map: tensor \"a\" is in \"number\", which is not a plain "
                  "*.safetensors file name"},
        IndexCase{"parent_folder", MapTo("../x.safetensors"),
                  "weight_map: tensor \"a\" is in \"../x.safetensors\", which is not a "
                  "plain *.safetensors file name"},
        IndexCase{
            "absolute", MapTo("/etc/x.safetensors"),
            "weight_map: tensor \"a\" is in \"/etc/x.safetensors\", which is not a "
            "plain *.safetensors file name"},
        IndexCase{
            "sub_folder", MapTo("sub/x.safetensors"),
            "weight_map: tensor \"a\" is in \"sub/x.safetensors\", which is not a "
            "plain *.safetensors file name"},
        IndexCase{
            "hidden", MapTo(".safetensors"),
            "weight_map: tensor \"a\" is in \".safetensors\", which is not a plain "
            "*.safetensors file name"},
        IndexCase{"embedded_nul", MapTo("x\\u0000.safetensors"),
                  "weight_map: tensor \"a\" is in \"x?.safetensors\", which is not a "
                  "plain *.safetensors file name"},
        IndexCase{"another_suffix", MapTo("x.bin"),
                  "weight_map: tensor \"a\" is in \"x.bin\", which is not a plain "
                  "*.safetensors file name"}),
    testing_support::CaseName());

TEST(ShardIndexSpec, RefusesMoreShardsThanItWouldOpen) {
  nlohmann::json map;
  for (int i = 0; i <= kShardsMax; ++i) {
    map["t" + std::to_string(i)] = "s" + std::to_string(i) + ".safetensors";
  }
  EXPECT_EQ(
      ParseShardIndex(nlohmann::json{{"weight_map", map}}.dump()).status().message(),
      "model.safetensors.index.json: weight_map: names 513 shards, more than 512");
}

TEST(ShardIndexSpec, RefusesMoreTensorsThanTheLimit) {
  nlohmann::json map;
  for (int i = 0; i <= kCheckpointTensorsMax; ++i) {
    map["t" + std::to_string(i)] = "s.safetensors";
  }
  EXPECT_EQ(
      ParseShardIndex(nlohmann::json{{"weight_map", map}}.dump()).status().message(),
      "model.safetensors.index.json: weight_map: has 65537 tensors, more than 65536");
}

TEST(CheckpointSpec, ReadsASingleFile) {
  const TempFolder folder;
  folder.Write("model.safetensors", SafetensorsBytes(Tensors("a", 3)));
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  const TensorInfo* a = checkpoint->Find("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(checkpoint->Find("b"), nullptr);
  float values[2] = {};
  ASSERT_TRUE(checkpoint->Read(*a, 0, 8, values).ok());
  EXPECT_EQ(values[1], 4.0f);
  ASSERT_TRUE(checkpoint->Read(*a, 4, 4, values).ok());
  EXPECT_EQ(values[0], 4.0f);
}

// Two shards whose index the cases below change.
class ShardsSpec : public testing::Test {
 protected:
  ShardsSpec() {
    folder_.Write("x.safetensors", SafetensorsBytes(Tensors("a", 1)));
    folder_.Write("y.safetensors", SafetensorsBytes(Tensors("b", 2)));
    SetIndex({{"a", "x.safetensors"}, {"b", "y.safetensors"}});
  }
  void SetIndex(const nlohmann::json& map) {
    folder_.Write(
        "model.safetensors.index.json",
        nlohmann::json{{"metadata", {{"total_size", 16}}}, {"weight_map", map}}.dump());
  }
  std::string Message() { return Checkpoint::Open(folder_.path()).status().message(); }

  TempFolder folder_;
};

TEST_F(ShardsSpec, AreReadAsOneCheckpoint) {
  const auto checkpoint = Checkpoint::Open(folder_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  float value = 0;
  ASSERT_TRUE(checkpoint->Read(*checkpoint->Find("b"), 0, 4, &value).ok());
  EXPECT_EQ(value, 2.0f);
}

TEST_F(ShardsSpec, MayBeSymbolicLinksAsInAHubCache) {
  const TempFolder blobs;
  std::filesystem::rename(folder_.File("x.safetensors"), blobs.File("abc123"));
  std::filesystem::create_symlink(blobs.File("abc123"), folder_.File("x.safetensors"));
  EXPECT_EQ(Message(), "");
}

TEST_F(ShardsSpec, TellOfEntriesThatNoShardHas) {
  SetIndex({{"a", "x.safetensors"}, {"b", "y.safetensors"}, {"c", "y.safetensors"}});
  const auto checkpoint = Checkpoint::Open(folder_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  EXPECT_EQ(checkpoint->notes(),
            std::vector<std::string>{
                "model.safetensors.index.json names 1 tensors that no shard has; the "
                "first is \"c\" in \"y.safetensors\""});
  EXPECT_EQ(checkpoint->PromisedIn("c"), "y.safetensors");
  EXPECT_EQ(checkpoint->PromisedIn("a"), "");
}

TEST_F(ShardsSpec, RefuseATensorThatTheIndexDoesNotKnow) {
  SetIndex({{"a", "x.safetensors"}, {"c", "y.safetensors"}});
  EXPECT_EQ(Message(),
            folder_.File("y.safetensors") + ": tensor \"b\" is not in the index");
}

TEST_F(ShardsSpec, RefuseATensorInTwoShards) {
  TensorMap both = Tensors("b", 2);
  both.merge(Tensors("a", 9));
  folder_.Write("y.safetensors", SafetensorsBytes(both));
  EXPECT_EQ(Message(), folder_.File("y.safetensors") +
                           ": tensor \"a\" is in \"x.safetensors\" by the index");
}

TEST_F(ShardsSpec, RefuseAMissingShard) {
  unlink(folder_.File("y.safetensors").c_str());
  const Status status = Checkpoint::Open(folder_.path()).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "cannot open " + folder_.File("y.safetensors") +
                                  ": No such file or directory");
}

TEST_F(ShardsSpec, AreNotReadBesideASingleFile) {
  folder_.Write("model.safetensors", SafetensorsBytes(Tensors("single", 1)));
  const auto checkpoint = Checkpoint::Open(folder_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  EXPECT_NE(checkpoint->Find("single"), nullptr);
  EXPECT_EQ(checkpoint->Find("a"), nullptr);
  EXPECT_EQ(checkpoint->notes(),
            std::vector<std::string>{
                "model.safetensors.index.json is not read: model.safetensors is"});
}

TEST_F(ShardsSpec, SayWhichFileIsBroken) {
  folder_.Write("y.safetensors", "short");
  EXPECT_EQ(Message(), folder_.File("y.safetensors") +
                           ": the file has 5 bytes, fewer than the 8 of its header's "
                           "length");
}

TEST(CheckpointSpec, RefusesAFolderWithoutWeights) {
  const TempFolder folder;
  const Status status = Checkpoint::Open(folder.path()).status();
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_EQ(status.message(), folder.path() +
                                  " has neither model.safetensors nor "
                                  "model.safetensors.index.json");
}

TEST(CheckpointSpec, ReadsAPointerOfGitLfsAsWhatItIs) {
  const TempFolder folder;
  folder.Write("model.safetensors",
               "version https://git-lfs.github.com/spec/v1\n"
               "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e"
               "2393\nsize 12345\n");
  const Status status = Checkpoint::Open(folder.path()).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), folder.File("model.safetensors") +
                                  " is a Git LFS pointer, not the file itself: run "
                                  "`git lfs pull` in its folder");
}

TEST(CheckpointSpec, SaysWhereALinkOfAHubCachePointsInVain) {
  const TempFolder folder;
  std::filesystem::create_symlink("../../blobs/abc", folder.File("model.safetensors"));
  const Status status = Checkpoint::Open(folder.path()).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            folder.File("model.safetensors") +
                " is a link to ../../blobs/abc, which does not exist: the download is "
                "incomplete; download the model again");
}

TEST(CheckpointSpec, RefusesAFifoWithoutWaitingForItsWriter) {
  const TempFolder folder;
  ASSERT_EQ(mkfifo(folder.File("model.safetensors").c_str(), 0600), 0);
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().message(),
            folder.File("model.safetensors") + " is not a regular file");
}

TEST(CheckpointSpec, RefusesAFolderInPlaceOfAFile) {
  const TempFolder folder;
  std::filesystem::create_directory(folder.File("model.safetensors"));
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().message(),
            folder.File("model.safetensors") + " is not a regular file");
}

TEST(CheckpointSpec, ReportsAFileThatShrinksWhileItIsRead) {
  const TempFolder folder;
  folder.Write("model.safetensors", SafetensorsBytes(Tensors("a", 1)));
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok());
  const auto size = std::filesystem::file_size(folder.File("model.safetensors"));
  std::filesystem::resize_file(folder.File("model.safetensors"), size - 4);
  float values[2];
  const Status status = checkpoint->Read(*checkpoint->Find("a"), 0, 8, values);
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_EQ(status.message(), folder.File("model.safetensors") + " ends at byte " +
                                  std::to_string(size - 4) +
                                  ", 4 bytes early: it has shrunk from " +
                                  std::to_string(size) + " bytes");
}

}  // namespace
}  // namespace pbs
