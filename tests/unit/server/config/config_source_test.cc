// Spec: server/config/config_source.h.
#include "server/config/config_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <initializer_list>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using testing::HasSubstr;

TEST(ConfigJson, ReadsEveryKindOfField) {
  v1::ServerConfig config;
  const absl::Status status = ParseConfigJson(
      R"({"listen":"127.0.0.1:1","reflection":true,
          "models":[{"name":"a","path":"/m"}],
          "admission":{"memory_bytes_max":"1099511627776"},
          "default_attention":{"pbs":{"threshold":0.75,"scope":"QUERY_HEAD"}}})",
      config);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(config.listen(), "127.0.0.1:1");
  EXPECT_TRUE(config.reflection());
  EXPECT_EQ(config.models(0).path(), "/m");
  EXPECT_EQ(config.admission().memory_bytes_max(), int64_t{1} << 40);
  EXPECT_EQ(config.default_attention().pbs().threshold(), 0.75f);
  EXPECT_EQ(config.default_attention().pbs().scope(), v1::QUERY_HEAD);
}

struct BadJsonCase {
  const char* name;
  std::string json;
  const char* part;  // of the message
};

class BadJsonSpec : public testing::TestWithParam<BadJsonCase> {};

TEST_P(BadJsonSpec, IsRefusedWithThePlace) {
  v1::ServerConfig config;
  const absl::Status status = ParseConfigJson(GetParam().json, config);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().part));
}

std::string Nested(int depth) {
  std::string json;
  for (int i = 0; i < depth; ++i) json += "{\"default_attention\":";
  return json;
}

INSTANTIATE_TEST_SUITE_P(
    Texts, BadJsonSpec,
    testing::Values(
        BadJsonCase{"empty", "", ""}, BadJsonCase{"not_json", "listen: x", ""},
        BadJsonCase{"not_an_object", "[]", ""},
        BadJsonCase{"unknown_field", R"({"lisen":"x"})", "lisen"},
        BadJsonCase{"unknown_nested_field", R"({"models":[{"nam":"x"}]})", "nam"},
        BadJsonCase{"wrong_type", R"({"drain_seconds_max":"soon"})",
                    "drain_seconds_max"},
        BadJsonCase{"out_of_int32", R"({"drain_seconds_max":99999999999})",
                    "drain_seconds_max"},
        BadJsonCase{"unknown_enum",
                    R"({"default_attention":{"pbs":{"scope":"ALL_HEADS"}}})", "scope"},
        BadJsonCase{"two_methods", R"({"default_attention":{"pbs":{},"dense":{}}})",
                    "oneof"},
        BadJsonCase{"truncated", R"({"listen":)", ""},
        BadJsonCase{"deeply_nested", Nested(10'000), ""}),
    testing_support::CaseName());

class ConfigFileSpec : public testing::Test {
 protected:
  ConfigFileSpec()
      : path_(testing::TempDir() + "pbs_config_" +
              testing::UnitTest::GetInstance()->current_test_info()->name()) {}
  ~ConfigFileSpec() override { std::remove(path_.c_str()); }

  void Write(const std::string& text) const { std::ofstream(path_) << text; }

  const std::string path_;
  v1::ServerConfig config_;
};

TEST_F(ConfigFileSpec, IsRead) {
  Write(R"({"listen":"127.0.0.1:7"})");
  ASSERT_TRUE(LoadConfigFile(path_, config_).ok());
  EXPECT_EQ(config_.listen(), "127.0.0.1:7");
}

TEST_F(ConfigFileSpec, AMissingFileIsNotFoundByName) {
  EXPECT_EQ(
      LoadConfigFile("/nowhere/config.json", config_),
      absl::NotFoundError("config /nowhere/config.json: No such file or directory"));
}

TEST_F(ConfigFileSpec, AnErrorNamesTheFile) {
  Write(R"({"lisen":1})");
  const absl::Status status = LoadConfigFile(path_, config_);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("config " + path_ + ": "));
}

TEST_F(ConfigFileSpec, AFileAtTheSizeLimitIsRead) {
  Write("{}" + std::string(kConfigBytesMax - 2, ' '));
  EXPECT_TRUE(LoadConfigFile(path_, config_).ok());
}

TEST_F(ConfigFileSpec, AFilePastTheSizeLimitIsRefused) {
  Write("{}" + std::string(kConfigBytesMax - 1, ' '));
  EXPECT_EQ(LoadConfigFile(path_, config_),
            absl::InvalidArgumentError("config " + path_ +
                                       ": the file has more than 1048576 bytes"));
}

TEST_F(ConfigFileSpec, WhatIsNoRegularFileIsRefusedWithoutWaiting) {
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  const absl::Status status = LoadConfigFile(path_, config_);
  EXPECT_EQ(status,
            absl::InvalidArgumentError("config " + path_ + ": not a regular file"));
}

v1::ServerConfig After(std::initializer_list<const char*> assignments) {
  v1::ServerConfig config;
  for (const char* assignment : assignments) {
    const absl::Status status = ApplySet(assignment, config);
    EXPECT_TRUE(status.ok()) << status;
  }
  return config;
}

TEST(ConfigSet, SetsEveryKindOfField) {
  const v1::ServerConfig config =
      After({"listen=127.0.0.1:1", "reflection=true", "drain_seconds_max=5",
             "admission.memory_bytes_max=1099511627776",
             "default_attention.pbs.threshold=0.75", "scheduling.yield_share=0.1",
             "default_attention.pbs.scope=QUERY_HEAD"});
  EXPECT_EQ(config.listen(), "127.0.0.1:1");
  EXPECT_TRUE(config.reflection());
  EXPECT_EQ(config.drain_seconds_max(), 5);
  EXPECT_EQ(config.admission().memory_bytes_max(), int64_t{1} << 40);
  EXPECT_EQ(config.scheduling().yield_share(), 0.1);
  EXPECT_EQ(config.default_attention().pbs().threshold(), 0.75f);
  EXPECT_EQ(config.default_attention().pbs().scope(), v1::QUERY_HEAD);
}

TEST(ConfigSet, LaterAssignmentsWin) {
  EXPECT_EQ(After({"listen=a:1", "listen=b:2"}).listen(), "b:2");
  EXPECT_TRUE(
      After({"default_attention.pbs.threshold=0.5", "default_attention.dense={}"})
          .default_attention()
          .has_dense());
}

TEST(ConfigSet, AnIndexNamesAnElementAndTheNextOneAppends) {
  const v1::ServerConfig config =
      After({"models.0.name=a", "models.0.path=/a", "models.1={\"name\":\"b\"}",
             "models.0.name=c"});
  ASSERT_EQ(config.models_size(), 2);
  EXPECT_EQ(config.models(0).name(), "c");
  EXPECT_EQ(config.models(0).path(), "/a");
  EXPECT_EQ(config.models(1).name(), "b");
}

TEST(ConfigSet, TheValueMayBeEmptyOrHoldEqualSigns) {
  const v1::ServerConfig config =
      After({"metrics_listen=", "models.0.path=/a=b", "log={\"level\":\"debug\"}"});
  EXPECT_TRUE(config.has_metrics_listen());
  EXPECT_EQ(config.models(0).path(), "/a=b");
  EXPECT_EQ(config.log().level(), "debug");
}

struct BadSetCase {
  const char* name;
  const char* assignment;
  const char* message;
};

class BadSetSpec : public testing::TestWithParam<BadSetCase> {};

TEST_P(BadSetSpec, SaysWhatWouldBeRightAndChangesNothing) {
  v1::ServerConfig config;
  config.set_listen("keep:1");
  const std::string before = config.SerializeAsString();
  EXPECT_EQ(ApplySet(GetParam().assignment, config),
            absl::InvalidArgumentError(GetParam().message));
  EXPECT_EQ(config.SerializeAsString(), before);
}

INSTANTIATE_TEST_SUITE_P(
    Assignments, BadSetSpec,
    testing::Values(
        BadSetCase{"no_equals", "listen", "--set listen is not path=value"},
        BadSetCase{"no_path", "=x", "--set =x is not path=value"},
        BadSetCase{"unknown_field", "lease.ttl=1",
                   "--set lease.ttl: no field \"ttl\" in LeaseConfig; it has "
                   "ttl_seconds_default, ttl_seconds_max, leases_max"},
        BadSetCase{"empty_part", "lease.=1",
                   "--set lease.: no field \"\" in LeaseConfig; it has "
                   "ttl_seconds_default, ttl_seconds_max, leases_max"},
        BadSetCase{"below_a_leaf", "listen.host=1",
                   "--set listen.host: listen has no field \"host\""},
        BadSetCase{"integer", "drain_seconds_max=soon",
                   "--set drain_seconds_max: \"soon\" is not a 32-bit integer"},
        BadSetCase{"integer_overflow", "drain_seconds_max=3000000000",
                   "--set drain_seconds_max: \"3000000000\" is not a 32-bit integer"},
        BadSetCase{"boolean", "reflection=yes",
                   "--set reflection: \"yes\" is not true or false"},
        BadSetCase{"double", "scheduling.yield_share=half",
                   "--set scheduling.yield_share: \"half\" is not a number"},
        BadSetCase{"number", "default_attention.pbs.threshold=high",
                   "--set default_attention.pbs.threshold: \"high\" is not a number"},
        BadSetCase{"enum", "default_attention.pbs.scope=ALL",
                   "--set default_attention.pbs.scope: \"ALL\" is not one of "
                   "SCOPE_UNSPECIFIED, KV_HEAD, QUERY_HEAD"},
        BadSetCase{"list_without_index", "models=x",
                   "--set models: models is a list; name an element, as in models.0"},
        BadSetCase{"list_of_texts_without_index", "push_targets=a:1",
                   "--set push_targets: push_targets is a list; name an element, as in "
                   "push_targets.0"},
        BadSetCase{
            "index_past_the_end_of_texts", "push_targets.1=a:1",
            "--set push_targets.1: index \"1\" of push_targets is not a number in "
            "[0, 0]"},
        BadSetCase{
            "below_a_text_of_a_list", "push_targets.0.host=a",
            "--set push_targets.0.host: push_targets is a list; name an element, "
            "as in push_targets.0"},
        BadSetCase{"index_past_the_end", "models.1.name=x",
                   "--set models.1.name: index \"1\" of models is not a number in "
                   "[0, 0]"},
        BadSetCase{"index_negative", "models.-1.name=x",
                   "--set models.-1.name: index \"-1\" of models is not a number in "
                   "[0, 0]"}),
    testing_support::CaseName());

TEST(ConfigSet, ATextOfAListIsReplacedOrAppended) {
  const v1::ServerConfig config =
      After({"push_targets.0=a:1", "push_targets.1=b:2", "push_targets.0=c:3"});
  EXPECT_THAT(config.push_targets(), testing::ElementsAre("c:3", "b:2"));
}

TEST(ConfigSet, AMessageTakesItsJsonOnly) {
  v1::ServerConfig config;
  const absl::Status status = ApplySet("lease=60", config);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("not the JSON of LeaseConfig"));
}

}  // namespace
}  // namespace pbs::server
