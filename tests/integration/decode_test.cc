// Spec: pbs-decode, the reference decode tier, as a process beside a server process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "client/cpp/client.h"
#include "proto/wire/messages.h"
#include "tests/support/case_name.h"
#include "tests/support/decode_in_one_process.h"
#include "tests/support/grpc_proxy.h"
#include "tests/support/run_process.h"
#include "tests/support/server_process.h"
#include "tests/support/tiny_model.h"

namespace pbs {
namespace {

using testing::HasSubstr;
using testing_support::DecodeInOneProcess;
using testing_support::GrpcProxy;
using testing_support::ProcessResult;
using testing_support::ReadFile;
using testing_support::RunProcess;
using testing_support::ScratchFolder;
using testing_support::ServerProcess;
using testing_support::TinyModelFolder;

constexpr char kRecallModel[] = "tests/data/recall-llama";
constexpr int kNewTokens = 12;

std::vector<int32_t> Prompt(int num_tokens) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < num_tokens; ++i) tokens.push_back((i * 37 + i / 7) % 128);
  return tokens;
}

std::string Text(const std::vector<int32_t>& tokens) {
  return nlohmann::json(tokens).dump();
}

// A chunk of values with one exponent bit of every fourth byte turned, its checksum as
// it was.
grpc::ByteBuffer CorruptValues(const std::string& method, grpc::ByteBuffer reply) {
  wire::KvChunk chunk;
  if (method != "/pbs.v1.KvSource/Fetch" || !wire::DecodeKvChunk(reply, &chunk).ok() ||
      chunk.kind != v1::KvChunk::V) {
    return reply;
  }
  std::vector<std::byte> bytes(chunk.payload.size());
  chunk.payload.CopyTo(bytes.data());
  for (size_t i = 3; i < bytes.size(); i += 4) bytes[i] ^= std::byte{0x02};
  chunk.payload = wire::Payload(grpc::Slice(bytes.data(), bytes.size()));
  return wire::EncodeKvChunk(chunk);
}

// A server of `model` (NAME=FOLDER), one thread.
struct Server {
  explicit Server(const std::string& model)
      : process(PBS_PREFILLD,
                {"--threads", "1", "--metrics-listen", "off", "--model", model}) {}

  ServerProcess process;
  const std::string address = process.WaitForAddress();
};

// One server of the tiny model for every case: what they do to it is what many clients
// of one server do.
class DecodeSpec : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_folder_ = new TinyModelFolder;
    shared_server_ = new Server("tiny=" + shared_folder_->path());
  }
  static void TearDownTestSuite() {
    delete shared_server_;
    delete shared_folder_;
  }

  // With the tiny model, one thread, twelve tokens.
  ProcessResult Decode(std::vector<std::string> arguments) const {
    for (const auto& [flag, value] : std::vector<std::pair<std::string, std::string>>{
             {"--server", address_},
             {"--model-path", folder_.path()},
             {"--max-new-tokens", std::to_string(kNewTokens)},
             {"--threads", "1"}}) {
      if (std::ranges::find(arguments, flag) != arguments.end()) continue;
      arguments.insert(arguments.end(), {flag, value});
    }
    arguments.insert(arguments.end(), {"--ignore-eos", "--json"});
    return RunProcess(PBS_DECODE, arguments);
  }
  std::string PromptFile(int num_tokens) const {
    return scratch_.Write("prompt.json", Text(Prompt(num_tokens)));
  }
  std::unique_ptr<client::Client> Connect() const {
    return *client::Client::Connect({.address = address_});
  }
  static v1::KvTicket TicketOf(const nlohmann::json& report) {
    v1::KvTicket ticket;
    const nlohmann::json& fields = report.at("ticket");
    ticket.set_handle(fields.at("handle").get<std::string>());
    ticket.set_epoch(std::stoull(fields.at("epoch").get<std::string>()));
    ticket.set_model_digest(fields.at("model_digest").get<std::string>());
    ticket.set_sparsity_digest(fields.at("sparsity_digest").get<std::string>());
    return ticket;
  }

  static inline TinyModelFolder* shared_folder_ = nullptr;
  static inline Server* shared_server_ = nullptr;

  const TinyModelFolder& folder_ = *shared_folder_;
  const std::string& address_ = shared_server_->address;
  const ScratchFolder scratch_;
};

TEST_F(DecodeSpec, DecodesWhatOneProcessWouldHaveDecoded) {
  const ProcessResult result =
      Decode({"--tokens", PromptFile(300), "--method", "dense"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const auto report = nlohmann::json::parse(result.out);
  EXPECT_EQ(report["tokens"],
            DecodeInOneProcess(folder_.path(), Prompt(300), {}, kNewTokens));
  EXPECT_EQ(report["prompt_tokens"], 300);
  EXPECT_EQ(report["model"], "tiny");
  EXPECT_EQ(report["density"], 1.0);
  EXPECT_EQ(report["kv_bytes"], 2 * 3 * 2 * 300 * 32 * 4);
}

TEST_F(DecodeSpec, FeedsTokensBehindThePrompt) {
  const std::vector<int32_t> question = {5, 99, 3};
  const ProcessResult result =
      Decode({"--tokens", PromptFile(200), "--method", "dense", "--then-tokens",
              scratch_.Write("question.json", Text(question)), "--output",
              scratch_.File("answer.json")});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const auto expected =
      DecodeInOneProcess(folder_.path(), Prompt(200), question, kNewTokens);
  EXPECT_EQ(nlohmann::json::parse(result.out)["tokens"], expected);
  EXPECT_EQ(nlohmann::json::parse(ReadFile(scratch_.File("answer.json"))), expected);
}

TEST_F(DecodeSpec, AnswersTheBundledPromptFromASparsePrefill) {
  const Server recall(std::string("recall=") + kRecallModel);
  const std::string prompt = std::string(kRecallModel) + "/prompt_8k.json";
  const std::string question = std::string(kRecallModel) + "/prompt_8k.question.json";
  const ProcessResult result =
      Decode({"--server", recall.address, "--model-path", kRecallModel, "--tokens",
              prompt, "--then-tokens", question, "--method", "pbs", "--threshold",
              "0.9", "--max-new-tokens", "1"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const auto report = nlohmann::json::parse(result.out);
  EXPECT_EQ(report["tokens"],
            nlohmann::json::parse(
                ReadFile(std::string(kRecallModel) + "/prompt_8k.answer.json")));
  EXPECT_LT(report["density"].get<double>(), 0.95);
}

TEST_F(DecodeSpec, AnswersTheBundledPromptFromACacheThatTravelledAsF8E4M3) {
  const Server recall(std::string("recall=") + kRecallModel);
  const std::string prompt = std::string(kRecallModel) + "/prompt_8k";
  const ProcessResult result =
      Decode({"--server", recall.address, "--model-path", kRecallModel, "--tokens",
              prompt + ".json", "--then-tokens", prompt + ".question.json", "--method",
              "dense", "--max-new-tokens", "1", "--wire-dtype", "f8_e4m3"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out)["tokens"],
            nlohmann::json::parse(ReadFile(prompt + ".answer.json")));
}

TEST_F(DecodeSpec, GivesTheLeaseBack) {
  const ProcessResult result = Decode({"--tokens", PromptFile(50)});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const v1::KvTicket ticket = TicketOf(nlohmann::json::parse(result.out));
  EXPECT_EQ(Connect()->Describe(ticket).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(DecodeSpec, DecodesAgainFromATicketThatWasKept) {
  const ProcessResult first = Decode({"--tokens", PromptFile(50), "--keep-lease"});
  ASSERT_EQ(first.exit_status, 0) << first.err;
  const auto report = nlohmann::json::parse(first.out);
  const ProcessResult second =
      Decode({"--ticket", scratch_.Write("ticket.json", report["ticket"].dump())});
  ASSERT_EQ(second.exit_status, 0) << second.err;
  const auto again = nlohmann::json::parse(second.out);
  EXPECT_EQ(again["tokens"], report["tokens"]);
  EXPECT_TRUE(again["density"].is_null());
  EXPECT_EQ(Connect()->Describe(TicketOf(report)).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(DecodeSpec, RefusesACorruptChunkOfValues) {
  GrpcProxy proxy(address_, CorruptValues);
  const ProcessResult result = Decode(
      {"--server", proxy.address(), "--ignore-endpoint", "--tokens", PromptFile(300)});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr("DATA_LOSS"));
  EXPECT_THAT(result.err, HasSubstr("layer 0"));
}

TEST_F(DecodeSpec, WithoutChecksumsACorruptChunkChangesTheAnswer) {
  GrpcProxy proxy(address_, CorruptValues);
  const std::string prompt = PromptFile(300);
  const ProcessResult whole = Decode({"--tokens", prompt, "--checksums", "off"});
  const ProcessResult corrupt =
      Decode({"--server", proxy.address(), "--ignore-endpoint", "--tokens", prompt,
              "--checksums", "off"});
  ASSERT_EQ(whole.exit_status, 0) << whole.err;
  ASSERT_EQ(corrupt.exit_status, 0) << corrupt.err;
  EXPECT_NE(nlohmann::json::parse(corrupt.out)["tokens"],
            nlohmann::json::parse(whole.out)["tokens"]);
}

TEST_F(DecodeSpec, RefusesTheCacheOfAnotherModel) {
  const TinyModelFolder other({.seed = 2});
  const ProcessResult result =
      Decode({"--model-path", other.path(), "--tokens", PromptFile(50)});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_THAT(result.err, HasSubstr("FAILED_PRECONDITION"));
  EXPECT_THAT(result.err, HasSubstr("digest"));
}

struct RefusalCase {
  const char* name;
  const char* tokens;  // the file's text
  std::vector<std::string> arguments;
  int exit_status;
  const char* message;
};

class RefusedDecodeSpec : public DecodeSpec,
                          public testing::WithParamInterface<RefusalCase> {};

TEST_P(RefusedDecodeSpec, EndsWithTheReason) {
  std::vector<std::string> arguments = GetParam().arguments;
  arguments.insert(arguments.end(),
                   {"--tokens", scratch_.Write("prompt.json", GetParam().tokens)});
  const ProcessResult result = Decode(arguments);
  EXPECT_EQ(result.exit_status, GetParam().exit_status);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr(GetParam().message));
  EXPECT_TRUE(Connect()->GetServerInfo().ok());
}

INSTANTIATE_TEST_SUITE_P(
    Reasons, RefusedDecodeSpec,
    testing::Values(
        RefusalCase{"unknown_model", "[1]", {"--model", "x"}, 1, "it serves tiny"},
        RefusalCase{"no_server", "[1]", {"--server", "127.0.0.1:1"}, 1, "127.0.0.1:1"},
        RefusalCase{
            "missing_model_folder", "[1]", {"--model-path", "/nowhere"}, 1, "/nowhere"},
        RefusalCase{"tokens_not_a_list", "{}", {}, 1, "not a JSON list"},
        RefusalCase{"tokens_empty", "[]", {}, 1, "at least one"},
        RefusalCase{"token_out_of_range",
                    "[3, 128]",
                    {},
                    1,
                    "element 1 is 128; a token id is a whole number below "
                    "vocab_size 128"},
        RefusalCase{"token_negative", "[-1]", {}, 1, "element 0 is -1"},
        RefusalCase{"token_not_whole", "[1.5]", {}, 1, "element 0 is 1.5"},
        RefusalCase{"too_long",
                    "[1]",
                    {"--max-new-tokens", "8193"},
                    1,
                    "need 8193 positions; the model has 8192"},
        RefusalCase{"bad_threshold",
                    "[1]",
                    {"--method", "pbs", "--threshold", "1.5"},
                    1,
                    "threshold 1.5 is outside (0, 1]"},
        RefusalCase{"bad_stride",
                    "[1]",
                    {"--method", "xattention", "--stride", "3"},
                    1,
                    "stride 3 is not a power of two"},
        RefusalCase{"bad_columns",
                    "[1]",
                    {"--method", "minference", "--vertical-tokens", "-1"},
                    1,
                    "vertical_tokens -1 is outside [1, 1048576]"},
        RefusalCase{"bad_tau",
                    "[1]",
                    {"--method", "flexprefill", "--gamma", "0.5", "--tau", "2"},
                    1,
                    "tau 2 is outside [0, 1]"},
        RefusalCase{"bad_dims",
                    "[1]",
                    {"--method", "prism", "--fast-dims", "7"},
                    1,
                    "fast_dims 7 is odd"},
        RefusalCase{"bad_alpha",
                    "[1]",
                    {"--method", "flashprefill", "--alpha", "0"},
                    1,
                    "alpha 0 is outside (0, 1]"},
        RefusalCase{"bad_segment_of_another_method",
                    "[1]",
                    {"--method", "prism", "--permute", "--segment-size", "200"},
                    1,
                    "segment_size 200 is not a multiple of block_size 128"},
        RefusalCase{"bad_option_of_the_profile",
                    "[1]",
                    {"--sink-blocks", "65536"},
                    1,
                    "sink_blocks 65536 is outside [0, 65535]"},
        RefusalCase{
            "no_new_tokens", "[1]", {"--max-new-tokens", "0"}, 2, "--max-new-tokens"},
        RefusalCase{"unknown_method", "[1]", {"--method", "magic"}, 2, "magic"},
        RefusalCase{"misplaced_option",
                    "[1]",
                    {"--method", "dense", "--scope", "kv_head"},
                    2,
                    "--scope kv_head is an option of pbs, and others with --permute; "
                    "--method dense does not have it"},
        RefusalCase{"option_of_another_method",
                    "[1]",
                    {"--method", "pbs", "--alpha", "0.1"},
                    2,
                    "--alpha 0.1 is an option of flashprefill; --method pbs does not "
                    "have it"},
        RefusalCase{"switch_of_other_methods",
                    "[1]",
                    {"--method", "minference", "--no-force-first-block"},
                    2,
                    "--no-force-first-block is an option of pbs, mean_pooling, "
                    "xattention, flexprefill and prism; --method minference does not "
                    "have it"},
        RefusalCase{"shared_option_with_dense",
                    "[1]",
                    {"--method", "dense", "--mean-correction"},
                    2,
                    "--method dense does not have it"},
        RefusalCase{"permute_with_pbs",
                    "[1]",
                    {"--method", "pbs", "--permute"},
                    2,
                    "--method pbs does not have it"},
        RefusalCase{"segments_without_permute",
                    "[1]",
                    {"--method", "prism", "--segment-size", "512"},
                    2,
                    "--method prism does not have it"},
        RefusalCase{"option_without_method",
                    "[1]",
                    {"--threshold", "0.5"},
                    2,
                    "--threshold needs --method pbs, mean_pooling, xattention or "
                    "prism"},
        RefusalCase{"as_published_without_method",
                    "[1]",
                    {"--as-published"},
                    2,
                    "--as-published needs --method pbs"},
        RefusalCase{"profile_and_method",
                    "[1]",
                    {"--profile", "paper", "--method", "pbs"},
                    2,
                    "--profile and --method exclude each other"},
        RefusalCase{"value_of_another_type", "[1]", {"--stride", "x"}, 2, "--stride"},
        RefusalCase{"value_of_more_bits",
                    "[1]",
                    {"--method", "minference", "--vertical-tokens", "99999999999"},
                    2,
                    "99999999999 not in range -2147483648 to 2147483647"},
        RefusalCase{"tokens_and_ticket", "[1]", {"--ticket", "x"}, 2, "--ticket"}),
    testing_support::CaseName());

TEST_F(DecodeSpec, ATicketTakesNoAttentionOptions) {
  for (const char* flag :
       {"--method=dense", "--sink-blocks=1", "--permute", "--profile=paper"}) {
    const ProcessResult result = Decode({"--ticket", "x", flag});
    EXPECT_EQ(result.exit_status, 2) << flag;
    EXPECT_THAT(result.err, HasSubstr("cannot be used with --ticket")) << flag;
  }
}

struct MethodCase {
  const char* name;
  std::vector<std::string> arguments;
  bool is_dense;  // the options select every block
};

class DecodeMethodSpec : public DecodeSpec,
                         public testing::WithParamInterface<MethodCase> {};

// Densities tell that the options reached the server; a density of 1 gives what one
// process with dense attention decodes.
TEST_P(DecodeMethodSpec, PrefillsWithTheMethodsOptions) {
  std::vector<std::string> arguments = GetParam().arguments;
  arguments.insert(arguments.end(), {"--tokens", PromptFile(600), "--block-size", "32",
                                     "--no-dense-fallback"});
  const ProcessResult result = Decode(arguments);
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const auto report = nlohmann::json::parse(result.out);
  if (GetParam().is_dense) {
    EXPECT_EQ(report["density"], 1.0);
    EXPECT_EQ(report["tokens"],
              DecodeInOneProcess(folder_.path(), Prompt(600), {}, kNewTokens));
  } else {
    EXPECT_LT(report["density"].get<double>(), 0.9);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Methods, DecodeMethodSpec,
    testing::Values(
        MethodCase{"pbs",
                   {"--method", "pbs", "--segment-size", "64", "--threshold", "0.3",
                    "--scope", "query_head"},
                   false},
        MethodCase{"xattention",
                   {"--method", "xattention", "--stride", "16", "--threshold", "0.3"},
                   false},
        MethodCase{"xattention_permuted",
                   {"--method", "xattention", "--threshold", "0.3", "--permute",
                    "--segment-size", "64"},
                   false},
        MethodCase{
            "xattention_all", {"--method", "xattention", "--threshold", "1"}, true},
        MethodCase{
            "minference",
            {"--method", "minference", "--vertical-tokens", "1", "--slash-tokens", "1"},
            false},
        MethodCase{"minference_all",
                   {"--method", "minference", "--slash-tokens", "600"},
                   true},
        MethodCase{"flexprefill", {"--method", "flexprefill", "--gamma", "0.3"}, false},
        MethodCase{"prism", {"--method", "prism", "--threshold", "0.3"}, false},
        MethodCase{"prism_all", {"--method", "prism", "--threshold", "1"}, true},
        MethodCase{
            "flashprefill", {"--method", "flashprefill", "--alpha", "0.9"}, false},
        MethodCase{
            "flashprefill_with_a_tail",
            {"--method", "flashprefill", "--alpha", "1", "--dense-tail-blocks", "19"},
            true},
        MethodCase{
            "flashprefill_with_a_window",
            {"--method", "flashprefill", "--alpha", "1", "--window-blocks", "19"},
            true},
        MethodCase{"flashprefill_with_sinks",
                   {"--method", "flashprefill", "--alpha", "1", "--sink-blocks", "19"},
                   true}),
    testing_support::CaseName());

TEST_F(DecodeSpec, ReportsCoverageAndTheHeadsThatItMadeDense) {
  for (const bool guards : {false, true}) {
    const ProcessResult result =
        Decode({"--tokens", PromptFile(600), "--block-size=32", "--method=pbs",
                "--threshold=0.3", "--coverage-rows=4", "--no-dense-fallback",
                guards ? "--coverage-min=1" : "--coverage-min=0"});
    ASSERT_EQ(result.exit_status, 0) << result.err;
    const auto report = nlohmann::json::parse(result.out);
    EXPECT_EQ(report["guarded_heads"] > 0, guards);
    EXPECT_EQ(report["coverage"] == 1.0, guards);
  }
}

TEST_F(DecodeSpec, RefusesWhatIsNoTicket) {
  for (const char* text :
       {"", "[]", "{}",
        R"({"handle":"x","epoch":"-1","model_digest":"","sparsity_digest":""})",
        R"({"handle":"x","epoch":5,"model_digest":"","sparsity_digest":""})"}) {
    const ProcessResult result =
        Decode({"--ticket", scratch_.Write("ticket.json", text)});
    EXPECT_EQ(result.exit_status, 1) << text;
    EXPECT_THAT(result.err, HasSubstr("ticket.json")) << text;
  }
}

TEST_F(DecodeSpec, AForeignTicketIsNotFound) {
  const ProcessResult result = Decode(
      {"--ticket",
       scratch_.Write(
           "ticket.json",
           R"({"handle":"0123456789abcdef0123456789abcdef","epoch":"7","model_digest":"","sparsity_digest":""})")});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_THAT(result.err, HasSubstr("NOT_FOUND"));
}

}  // namespace
}  // namespace pbs
