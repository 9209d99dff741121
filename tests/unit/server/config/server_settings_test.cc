// Spec: server/config/server_settings.h.
#include "server/config/server_settings.h"

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pbs/limits.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

v1::ServerConfig Defaults() {
  v1::ServerConfig config;
  ApplyDefaults(config);
  return config;
}

v1::ServerConfig OneModel() {
  v1::ServerConfig config;
  config.add_models()->set_name("tiny");
  config.mutable_models(0)->set_path("/models/tiny");
  ApplyDefaults(config);
  return config;
}

void AddProfiles(int count, v1::ServerConfig& config) {
  for (int i = 0; i < count; ++i) config.mutable_models(0)->add_profiles("p.json");
}

TEST(ConfigDefaults, AreValid) { EXPECT_THAT(Validate(Defaults()), IsEmpty()); }

// Every field of `message` that is neither a list nor inside a oneof.
void ExpectEveryFieldSet(const google::protobuf::Message& message) {
  const auto& type = *message.GetDescriptor();
  const auto& fields = *message.GetReflection();
  for (int i = 0; i < type.field_count(); ++i) {
    const auto* field = type.field(i);
    if (field->is_repeated()) continue;
    EXPECT_TRUE(fields.HasField(message, field)) << field->full_name();
    if (field->message_type() != nullptr && field->name() != "default_attention") {
      ExpectEveryFieldSet(fields.GetMessage(message, field));
    }
  }
}

TEST(ConfigDefaults, CoverEveryField) {
  ExpectEveryFieldSet(Defaults());
  ExpectEveryFieldSet(OneModel().models(0));
}

TEST(ConfigDefaults, LeaveWhatIsSet) {
  v1::ServerConfig config;
  config.set_listen("localhost:1");
  config.mutable_default_attention()->mutable_dense();
  ApplyDefaults(config);
  EXPECT_EQ(config.listen(), "localhost:1");
  EXPECT_TRUE(config.default_attention().has_dense());
}

TEST(ConfigDefaults, OptionsWithoutAMethodChangeTheDefaultAttention) {
  v1::ServerConfig config;
  config.mutable_default_attention()->set_window_blocks(5);
  const auto settings = MakeSettings(config);
  ASSERT_TRUE(settings.ok()) << settings.status();
  const std::vector<AttentionProfile> built_in = DefaultProfiles();
  ASSERT_EQ(settings->default_attentions.size(), built_in.size());
  for (size_t i = 0; i < built_in.size(); ++i) {
    AttentionOptions expected = built_in[i].options;
    expected.window_blocks = 5;
    EXPECT_EQ(settings->default_attentions[i].options, expected);
  }
  EXPECT_EQ(settings->service.default_attention, settings->default_attentions.front());
}

TEST(ConfigDefaults, ANamedMethodGetsTheDenseTailOfPrefill) {
  v1::ServerConfig config;
  config.mutable_default_attention()->mutable_prism();
  const auto settings = MakeSettings(config);
  ASSERT_TRUE(settings.ok()) << settings.status();
  const AttentionOptions& options = settings->service.default_attention.options;
  EXPECT_EQ(options.method, Method::kPrism);
  EXPECT_EQ(options.dense_tail_blocks, kPrefillTailBlocks);
  EXPECT_EQ(settings->default_attentions.size(), 1u);
}

// The table of docs/OPERATIONS.md, "Configuration".
TEST(ConfigDefaults, AreThoseOfTheDocumentation) {
  v1::ServerConfig documented;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
      R"pb(
        listen: "127.0.0.1:50051"
        metrics_listen: "127.0.0.1:9464"
        advertise: ""
        shared_memory_socket: ""
        backend: "auto"
        reflection: false
        drain_seconds_max: 60
        vllm_metrics: false
        cpu { threads: 0 isa: "auto" compute_dtype: "auto" }
        cuda { device: 0 devices: "" module: "" cublaslt: "" memory_bytes_max: 0 }
        admission {
          memory_bytes_max: 0
          queue_requests_max: 64
          tokens_max: 1048576
          attend_tokens_max: 1048576
          upload_seconds_max: 120
          upload_requests_max: 32
        }
        scheduling {
          yield_share: 0.25
          batch_tokens_max: 0
          batch_prompt_tokens_max: 1024
        }
        lease { ttl_seconds_default: 60 ttl_seconds_max: 600 leases_max: 1024 }
        transport {
          chunk_bytes: 1048576
          connections_max: 1024
          concurrent_streams_max: 64
          metadata_bytes_max: 65536
          memory_quota_bytes: 268435456
          stream_window_bytes: 1048576
          keepalive_seconds: 30
          keepalive_timeout_seconds: 20
          write_stall_seconds_max: 60
        }
        log { level: "info" }
        default_attention {
          xattention {
            block_size: 64
            stride: 8
            threshold: 0.9
            force_first_block: true
            use_given_lists: false
          }
          coverage_rows: 0
          dense_tail_blocks: 3
          sink_blocks: 0
          window_blocks: 8
          mean_correction: true
          as_published: false
          coverage_min: 0
        })pb",
      &documented));
  EXPECT_EQ(Defaults().DebugString(), documented.DebugString());
}

TEST(ServerSettingsSpec, DefaultsArrive) {
  const auto settings = MakeSettings({});
  ASSERT_TRUE(settings.ok()) << settings.status();
  EXPECT_EQ(settings->service.listen, "127.0.0.1:50051");
  EXPECT_EQ(settings->service.default_attention, DefaultProfile());
  EXPECT_EQ(settings->metrics_listen, "127.0.0.1:9464");
  EXPECT_EQ(settings->backend, BackendChoice::kAuto);
  EXPECT_EQ(settings->cuda.devices, std::vector<int32_t>{0});
  EXPECT_EQ(settings->log_level, LogLevel::kInfo);
  EXPECT_EQ(settings->drain_max, absl::Seconds(60));
}

TEST(ServerSettingsSpec, EveryFieldArrives) {
  v1::ServerConfig config = OneModel();
  config.mutable_models(0)->set_kv_dtype("f16");
  config.mutable_models(0)->set_yarn_attn_factor("ignored");
  config.mutable_models(0)->set_tokens_max(4096);
  config.mutable_models(0)->add_profiles("mine.json");
  config.set_backend("cpu");
  config.mutable_cpu()->set_threads(3);
  config.mutable_cpu()->set_isa("avx2");
  config.mutable_cpu()->set_compute_dtype("bf16");
  config.mutable_admission()->set_queue_requests_max(7);
  config.mutable_admission()->set_upload_seconds_max(11);
  config.mutable_cuda()->set_devices("2,0");
  config.mutable_scheduling()->set_yield_share(0.5);
  config.mutable_scheduling()->set_batch_tokens_max(4096);
  config.mutable_scheduling()->set_batch_prompt_tokens_max(512);
  config.mutable_lease()->set_leases_max(13);
  config.mutable_lease()->set_ttl_seconds_default(17);
  config.mutable_transport()->set_keepalive_seconds(19);
  config.mutable_transport()->set_connections_max(23);
  config.mutable_transport()->set_metadata_bytes_max(29'000);
  config.mutable_log()->set_level("warning");
  config.mutable_default_attention()->mutable_mean_pooling()->set_threshold(0.5f);
  config.mutable_default_attention()->set_dense_fallback(false);
  const auto settings = MakeSettings(config);
  ASSERT_TRUE(settings.ok()) << settings.status();
  ASSERT_EQ(settings->models.size(), 1u);
  EXPECT_EQ(settings->models[0].name, "tiny");
  EXPECT_EQ(settings->models[0].kv_dtype, DType::kF16);
  EXPECT_EQ(settings->models[0].yarn_attn_factor, AttnFactor::kIgnored);
  EXPECT_EQ(settings->models[0].tokens_max, 4096);
  EXPECT_THAT(settings->models[0].profiles, ElementsAre("mine.json"));
  EXPECT_EQ(settings->backend, BackendChoice::kCpu);
  EXPECT_EQ(settings->cpu.threads, 3);
  EXPECT_EQ(settings->cpu.isa, "avx2");
  EXPECT_EQ(settings->cpu.compute_dtype, "bf16");
  EXPECT_EQ(settings->service.limits.queue_requests_max, 7);
  EXPECT_EQ(settings->service.limits.upload_seconds_max, 11);
  EXPECT_EQ(settings->cuda.devices, (std::vector<int32_t>{2, 0}));
  EXPECT_EQ(settings->scheduling.yield_share, 0.5);
  EXPECT_EQ(settings->scheduling.batch_tokens_max, 4096);
  EXPECT_EQ(settings->scheduling.batch_prompt_tokens_max, 512);
  EXPECT_EQ(settings->leases.leases_max, 13);
  EXPECT_EQ(settings->leases.ttl_seconds_default, 17);
  EXPECT_EQ(settings->service.transport.keepalive_seconds, 19);
  EXPECT_EQ(settings->service.transport.connections_max, 23);
  EXPECT_EQ(settings->service.transport.metadata_bytes_max, 29'000);
  EXPECT_EQ(settings->log_level, LogLevel::kWarning);
  const AttentionProfile& profile = settings->service.default_attention;
  EXPECT_EQ(profile.options.method, Method::kMeanPooling);
  EXPECT_EQ(profile.options.threshold, 0.5f);
  EXPECT_EQ(profile.dense_fallback, false);
}

TEST(ServerSettingsSpec, AnAutomaticDTypeStaysOpen) {
  const auto settings = MakeSettings(OneModel());
  ASSERT_TRUE(settings.ok()) << settings.status();
  EXPECT_EQ(settings->models[0].kv_dtype, std::nullopt);
  EXPECT_EQ(settings->models[0].yarn_attn_factor, AttnFactor::kApplied);
}

TEST(ServerSettingsSpec, EveryViolationIsListedAtOnce) {
  v1::ServerConfig config = Defaults();
  config.set_backend("tpu");
  config.mutable_lease()->set_leases_max(0);
  config.mutable_log()->set_level("loud");
  EXPECT_EQ(MakeSettings(config).status(),
            absl::InvalidArgumentError(
                "the configuration has 3 error(s):\n"
                "  backend \"tpu\" is not one of auto, cpu, cuda\n"
                "  lease.leases_max 0 is outside [1, 1000000]\n"
                "  log.level \"loud\" is not one of debug, info, warning, error"));
}

struct ViolationCase {
  const char* name;
  std::function<void(v1::ServerConfig&)> change;
  const char* violation;
};

class ConfigViolationSpec : public testing::TestWithParam<ViolationCase> {};

TEST_P(ConfigViolationSpec, NamesFieldValueAndLimit) {
  v1::ServerConfig config = OneModel();
  GetParam().change(config);
  EXPECT_THAT(Validate(config), ElementsAre(GetParam().violation));
}

INSTANTIATE_TEST_SUITE_P(
    Addresses, ConfigViolationSpec,
    testing::Values(
        ViolationCase{"listen", [](auto& c) { c.set_listen("nowhere"); },
                      "listen \"nowhere\" is not host:port: no port"},
        ViolationCase{"shared_memory_socket_length",
                      [](auto& c) {
                        c.set_backend("cpu");
                        c.set_shared_memory_socket(std::string(108, 'x'));
                      },
                      "bytes of shared_memory_socket 108 is outside [1, 107]"},
        ViolationCase{"shared_memory_socket_with_a_zero",
                      [](auto& c) {
                        c.set_shared_memory_socket({'a', '\0', 'b'});
                      },
                      "shared_memory_socket has a zero byte; it names a file"},
        ViolationCase{"shared_memory_socket_on_a_gpu",
                      [](auto& c) {
                        c.set_backend("cuda");
                        c.set_shared_memory_socket("/run/pbs");
                      },
                      "shared_memory_socket \"/run/pbs\" needs backend cpu: on a GPU's "
                      "server caches are in pinned memory, which cannot be shared"},
        ViolationCase{"advertise", [](auto& c) { c.set_advertise("node 7:1"); },
                      "advertise \"node 7:1\" is not host:port: host is no name, IPv4 "
                      "address or [IPv6 address]"},
        ViolationCase{"advertise_everything",
                      [](auto& c) { c.set_advertise("0.0.0.0:50051"); },
                      "advertise \"0.0.0.0:50051\" stands for every address; it must "
                      "name one at which decode tiers reach this server"},
        ViolationCase{"metrics_listen", [](auto& c) { c.set_metrics_listen("x"); },
                      "metrics_listen \"x\" is not host:port: no port"},
        ViolationCase{"same_port",
                      [](auto& c) { c.set_metrics_listen("127.0.0.1:50051"); },
                      "metrics_listen \"127.0.0.1:50051\" is also listen; they need "
                      "different ports"}),
    testing_support::CaseName());

std::function<void(v1::ServerConfig&)> PushTo(const std::vector<std::string>& targets) {
  return [targets](v1::ServerConfig& config) {
    for (const std::string& target : targets) config.add_push_targets(target);
  };
}

std::vector<std::string> ManyTargets(int count) {
  std::vector<std::string> targets;
  for (int i = 1; i <= count; ++i) targets.push_back(absl::StrCat("d:", i));
  return targets;
}

INSTANTIATE_TEST_SUITE_P(
    PushTargets, ConfigViolationSpec,
    testing::Values(
        ViolationCase{"space", PushTo({"a 7:1"}),
                      "push_targets.0 \"a 7:1\" is not host:port: host is no name, "
                      "IPv4 address or [IPv6 address]"},
        ViolationCase{"scheme", PushTo({"unix:/sink"}),
                      "push_targets.0 \"unix:/sink\" is not host:port: port is not "
                      "a number in [0, 65535]"},
        ViolationCase{"everywhere", PushTo({"0.0.0.0:1"}),
                      "push_targets.0 \"0.0.0.0:1\" is no address to connect to; "
                      "it names one host and a port in [1, 65535]"},
        ViolationCase{"no_port", PushTo({"a:0"}),
                      "push_targets.0 \"a:0\" is no address to connect to; it names "
                      "one host and a port in [1, 65535]"},
        ViolationCase{"twice", PushTo({"a:1", "b:1", "a:1"}),
                      "push_targets.2 \"a:1\" is there twice"},
        ViolationCase{"too_many", PushTo(ManyTargets(257)),
                      "number of push_targets 257 is outside [0, 256]"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Models, ConfigViolationSpec,
    testing::Values(
        ViolationCase{"empty_name", [](auto& c) { c.mutable_models(0)->set_name(""); },
                      "models.0.name \"\" is not 1 to 64 of [A-Za-z0-9._-]"},
        ViolationCase{"odd_name", [](auto& c) { c.mutable_models(0)->set_name("a/b"); },
                      "models.0.name \"a/b\" is not 1 to 64 of [A-Za-z0-9._-]"},
        ViolationCase{"duplicate", [](auto& c) { *c.add_models() = c.models(0); },
                      "models.1.name \"tiny\" is taken by an earlier model; names are "
                      "unique"},
        ViolationCase{"no_path", [](auto& c) { c.mutable_models(0)->set_path(""); },
                      "models.0.path \"\" is empty; it names a model folder"},
        ViolationCase{
            "yarn_attn_factor",
            [](auto& c) { c.mutable_models(0)->set_yarn_attn_factor("vllm"); },
            "models.0.yarn_attn_factor \"vllm\" is not one of applied, ignored"},
        ViolationCase{"kv_dtype",
                      [](auto& c) { c.mutable_models(0)->set_kv_dtype("fp8"); },
                      "models.0.kv_dtype \"fp8\" is not one of auto, f32, f16, bf16"},
        ViolationCase{"tokens_max",
                      [](auto& c) { c.mutable_models(0)->set_tokens_max(-1); },
                      "models.0.tokens_max -1 is outside [0, 1048576]"},
        ViolationCase{"empty_profile",
                      [](auto& c) { c.mutable_models(0)->add_profiles(""); },
                      "models.0.profiles.0 \"\" is empty; it names the file of a "
                      "profile"},
        ViolationCase{"too_many_profiles", [](auto& c) { AddProfiles(65, c); },
                      "models.0.number of profiles 65 is outside [0, 64]"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Ranges, ConfigViolationSpec,
    testing::Values(
        ViolationCase{"threads", [](auto& c) { c.mutable_cpu()->set_threads(1025); },
                      "cpu.threads 1025 is outside [0, 1024]"},
        ViolationCase{"isa", [](auto& c) { c.mutable_cpu()->set_isa("sse"); },
                      "cpu.isa \"sse\" is not one of auto, scalar, avx2, avx512, "
                      "avx512_bf16"},
        ViolationCase{"compute_dtype",
                      [](auto& c) { c.mutable_cpu()->set_compute_dtype("f16"); },
                      "cpu.compute_dtype \"f16\" is not one of auto, f32, bf16"},
        ViolationCase{"memory",
                      [](auto& c) { c.mutable_admission()->set_memory_bytes_max(-1); },
                      "admission.memory_bytes_max -1 is outside [0, 1125899906842624]"},
        ViolationCase{"queue",
                      [](auto& c) { c.mutable_admission()->set_queue_requests_max(0); },
                      "admission.queue_requests_max 0 is outside [1, 65536]"},
        ViolationCase{"device", [](auto& c) { c.mutable_cuda()->set_device(64); },
                      "cuda.device 64 is outside [0, 63]"},
        ViolationCase{"devices_beyond",
                      [](auto& c) { c.mutable_cuda()->set_devices("0,64"); },
                      "cuda.devices \"0,64\" holds \"64\"; it is all, or a list of "
                      "numbers in [0, 63], as 0,2"},
        ViolationCase{"devices_not_numbers",
                      [](auto& c) { c.mutable_cuda()->set_devices("0,"); },
                      "cuda.devices \"0,\" holds \"\"; it is all, or a list of numbers "
                      "in [0, 63], as 0,2"},
        ViolationCase{"devices_twice",
                      [](auto& c) { c.mutable_cuda()->set_devices("1,0,1"); },
                      "cuda.devices \"1,0,1\" holds 1 twice"},
        ViolationCase{"yield_share",
                      [](auto& c) { c.mutable_scheduling()->set_yield_share(1.5); },
                      "scheduling.yield_share 1.5 is outside [0, 1]"},
        ViolationCase{
            "yield_share_that_is_no_number",
            [](auto& c) { c.mutable_scheduling()->set_yield_share(std::nan("")); },
            "scheduling.yield_share nan is outside [0, 1]"},
        ViolationCase{
            "batch",
            [](auto& c) { c.mutable_scheduling()->set_batch_tokens_max(65'537); },
            "scheduling.batch_tokens_max 65537 is outside [0, 65536]"},
        ViolationCase{
            "batch_prompt",
            [](auto& c) { c.mutable_scheduling()->set_batch_prompt_tokens_max(0); },
            "scheduling.batch_prompt_tokens_max 0 is outside [1, 65536]"},
        ViolationCase{
            "tokens",
            [](auto& c) { c.mutable_admission()->set_tokens_max(kSeqLenMax + 1); },
            "admission.tokens_max 1048577 is outside [1, 1048576]"},
        ViolationCase{"lease_default_past_its_maximum",
                      [](auto& c) { c.mutable_lease()->set_ttl_seconds_default(601); },
                      "lease.ttl_seconds_default 601 is outside [1, 600]"},
        ViolationCase{"chunk_bytes",
                      [](auto& c) { c.mutable_transport()->set_chunk_bytes(65'535); },
                      "transport.chunk_bytes 65535 is outside [65536, 4194304]"},
        ViolationCase{
            "streams",
            [](auto& c) { c.mutable_transport()->set_concurrent_streams_max(0); },
            "transport.concurrent_streams_max 0 is outside [1, 1024]"},
        ViolationCase{
            "stream_window",
            [](auto& c) { c.mutable_transport()->set_stream_window_bytes(1 << 25); },
            "transport.stream_window_bytes 33554432 is outside [65536, 16777216]"},
        ViolationCase{
            "uploads",
            [](auto& c) { c.mutable_admission()->set_upload_requests_max(65'537); },
            "admission.upload_requests_max 65537 is outside [1, 65536]"},
        ViolationCase{"drain", [](auto& c) { c.set_drain_seconds_max(-1); },
                      "drain_seconds_max -1 is outside [0, 86400]"},
        ViolationCase{
            "write_stall",
            [](auto& c) { c.mutable_transport()->set_write_stall_seconds_max(3601); },
            "transport.write_stall_seconds_max 3601 is outside [1, 3600]"},
        ViolationCase{"connections",
                      [](auto& c) { c.mutable_transport()->set_connections_max(0); },
                      "transport.connections_max 0 is outside [1, 1000000]"},
        ViolationCase{
            "metadata",
            [](auto& c) { c.mutable_transport()->set_metadata_bytes_max(1 << 21); },
            "transport.metadata_bytes_max 2097152 is outside [8192, 1048576]"},
        ViolationCase{"keepalive",
                      [](auto& c) { c.mutable_transport()->set_keepalive_seconds(0); },
                      "transport.keepalive_seconds 0 is outside [1, 3600]"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Profile, ConfigViolationSpec,
    testing::Values(
        ViolationCase{"threshold",
                      [](auto& c) {
                        c.mutable_default_attention()->mutable_pbs()->set_threshold(2);
                      },
                      "default_attention: threshold 2 is outside (0, 1]"},
        ViolationCase{
            "given_order",
            [](auto& c) {
              c.mutable_default_attention()->mutable_pbs()->set_use_given_order(true);
            },
            "default_attention: use_given_order and use_given_lists need "
            "tensors that only a request has; a profile has them false"},
        ViolationCase{
            "option_of_another_method",
            [](auto& c) {
              c.mutable_default_attention()->mutable_dense();
              c.mutable_default_attention()->set_dense_tail_blocks(2);
            },
            "default_attention: method dense has no option dense_tail_blocks=2; pbs, "
            "mean_pooling, xattention, minference, flexprefill, prism, flashprefill "
            "have it"}),
    testing_support::CaseName());

TEST(ConfigViolations, LimitsThemselvesAreAllowed) {
  v1::ServerConfig config = OneModel();
  config.mutable_admission()->set_tokens_max(kSeqLenMax);
  config.mutable_transport()->set_chunk_bytes(kChunkBytesMax);
  config.mutable_lease()->set_ttl_seconds_default(600);
  config.set_drain_seconds_max(0);
  config.set_metrics_listen("");
  EXPECT_THAT(Validate(config), IsEmpty());
}

}  // namespace
}  // namespace pbs::server
