// Spec: pbs-bench, the data plane's benchmark, as a process beside a server process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "proto/wire/messages.h"
#include "tests/support/case_name.h"
#include "tests/support/grpc_proxy.h"
#include "tests/support/run_process.h"
#include "tests/support/server_process.h"
#include "tests/support/tiny_model.h"

namespace pbs {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing_support::GrpcProxy;
using testing_support::ProcessResult;
using testing_support::ReadFile;
using testing_support::RunProcess;
using testing_support::ScratchFolder;
using testing_support::ServerProcess;
using testing_support::TinyModelFolder;

// Flips a bit of what travels without a checksum.
grpc::ByteBuffer CorruptUnchecked(const std::string& method, grpc::ByteBuffer reply) {
  wire::KvChunk chunk;
  if (method != "/pbs.v1.KvSource/Fetch" || !wire::DecodeKvChunk(reply, &chunk).ok() ||
      chunk.payload.size() == 0 || chunk.crc32c.has_value()) {
    return reply;
  }
  std::vector<std::byte> bytes(chunk.payload.size());
  chunk.payload.CopyTo(bytes.data());
  bytes.back() ^= std::byte{1};
  chunk.payload = wire::Payload(grpc::Slice(bytes.data(), bytes.size()));
  return wire::EncodeKvChunk(chunk);
}

struct Server {
  const TinyModelFolder folder;
  ServerProcess process{PBS_PREFILLD,
                        {"--threads", "1", "--metrics-listen", "off", "--model",
                         "tiny=" + folder.path()}};
  const std::string address = process.WaitForAddress();
};

// One server for every case.
class BenchSpec : public testing::Test {
 protected:
  static void SetUpTestSuite() { shared_ = new Server; }
  static void TearDownTestSuite() { delete shared_; }

  static ProcessResult Bench(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "transfer");
    if (std::ranges::find(arguments, "--server") == arguments.end()) {
      arguments.insert(arguments.end(), {"--server", shared_->address});
    }
    arguments.insert(arguments.end(),
                     {"--mib", "1", "--rounds", "2", "--chunk-bytes", "65536"});
    return RunProcess(PBS_BENCH, arguments);
  }

  static inline Server* shared_ = nullptr;
};

void ExpectSpread(const json& cell, const char* field) {
  SCOPED_TRACE(field);
  ASSERT_TRUE(cell.contains(field));
  const json& spread = cell[field];
  ASSERT_TRUE(spread.is_object()) << spread;
  EXPECT_GT(spread.value("min", -1.0), 0);
  EXPECT_GE(spread.value("median", -1.0), spread.value("min", -1.0));
  EXPECT_GE(spread.value("max", -1.0), spread.value("median", -1.0));
}

TEST_F(BenchSpec, MeasuresEveryKindOfTransferBesideRawTcp) {
  const ProcessResult result =
      Bench({"--server-pid", std::to_string(shared_->process.pid())});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const json report = json::parse(result.out);
  EXPECT_EQ(report["benchmark"], "data_plane");
  for (const char* field : {"date", "command", "commit"}) {
    EXPECT_NE(report.value(field, ""), "") << field;
  }
  EXPECT_NE(report["machine"].value("cpu", ""), "");
  EXPECT_GT(report["machine"].value("cores", 0), 0);
  EXPECT_EQ(report["setting"]["rounds"], 2);
  EXPECT_EQ(report["setting"]["chunk_bytes"], 65536);
  EXPECT_EQ(report["cache"]["model"], "tiny");

  std::vector<std::string> kinds;
  for (const json& cell : report["cells"]) {
    SCOPED_TRACE(cell.dump());
    std::string kind = cell.value("direction", "") + " " + cell.value("peer", "") +
                       " " + std::to_string(cell.value("streams", 0));
    if (cell.contains("checksums")) kind += cell["checksums"] ? " on" : " off";
    kinds.push_back(std::move(kind));
    EXPECT_NEAR(cell.value("bytes", 0.0), 1 << 20, 1 << 10);
    ExpectSpread(cell, "gb_per_second");
    ExpectSpread(cell, "client_cpu_seconds_per_gb");
    ExpectSpread(cell, "cpu_seconds_per_gb");
    if (cell["peer"] != "pbs") continue;
    ExpectSpread(cell, "ratio_to_tcp");
    EXPECT_FALSE(cell.contains("ratio_to_protobuf"));
    EXPECT_TRUE(cell["missed"].is_array());
  }
  EXPECT_THAT(kinds, testing::ElementsAre(
                         "upload pbs 1", "upload tcp 1", "upload pbs 2", "upload tcp 2",
                         "download pbs 1 on", "download pbs 1 off", "download tcp 1",
                         "download pbs 2 on", "download pbs 2 off", "download tcp 2"));
}

TEST_F(BenchSpec, ComparesDownloadsWithProtobufMessagesInTheSameRun) {
  const ProcessResult result =
      Bench({"--peers", "protobuf", "--direction", "download", "--checksums", "on"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const json report = json::parse(result.out);
  std::vector<std::string> kinds;
  for (const json& cell : report["cells"]) {
    SCOPED_TRACE(cell.dump());
    kinds.push_back(cell.value("peer", "") + " " +
                    std::to_string(cell.value("streams", 0)));
    ExpectSpread(cell, "gb_per_second");
    ExpectSpread(cell, "client_cpu_seconds_per_gb");
    if (cell["peer"] == "pbs") ExpectSpread(cell, "ratio_to_protobuf");
    if (cell["peer"] == "protobuf") ExpectSpread(cell, "cpu_seconds_per_gb");
  }
  EXPECT_THAT(kinds,
              testing::ElementsAre("pbs 1", "protobuf 1", "pbs 2", "protobuf 2"));
}

TEST_F(BenchSpec, WritesTheJsonToAFileAndTheTableToStdout) {
  const ScratchFolder scratch;
  const ProcessResult result = Bench({"--direction", "upload", "--streams", "1",
                                      "--output", scratch.File("report.json")});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  EXPECT_EQ(json::parse(ReadFile(scratch.File("report.json")))["cells"].size(), 2u);
  EXPECT_THAT(result.out, HasSubstr("x TCP"));
  EXPECT_EQ(result.err, "");
}

TEST_F(BenchSpec, WithoutTheServersProcessItsCpuTimeIsUnknown) {
  const ProcessResult result = Bench({"--direction", "download", "--streams", "1"});
  ASSERT_EQ(result.exit_status, 0) << result.err;
  const json report = json::parse(result.out);
  for (const json& cell : report["cells"]) {
    ExpectSpread(cell, "client_cpu_seconds_per_gb");
    EXPECT_EQ(cell["cpu_seconds_per_gb"].is_null(), cell["peer"] == "pbs");
  }
}

TEST_F(BenchSpec, GivesTheLeaseBack) {
  Server own;
  ASSERT_EQ(
      Bench({"--server", own.address, "--direction", "download", "--streams", "1"})
          .exit_status,
      0);
  own.process.Signal(SIGTERM);
  EXPECT_EQ(own.process.WaitForEvent("draining").value("leases", -1), 0);
}

TEST_F(BenchSpec, RefusesToReportATransferOfWrongBytes) {
  GrpcProxy proxy(shared_->address, CorruptUnchecked);
  const ProcessResult result =
      Bench({"--server", proxy.address(), "--direction", "download", "--checksums",
             "off", "--streams", "1"});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr("DATA_LOSS: a fetch returned other bytes"));
}

// ---- refusals

struct RefusalCase {
  const char* name;
  std::vector<std::string> arguments;
  const char* message;
};

class BenchUsageSpec : public testing::TestWithParam<RefusalCase> {};

TEST_P(BenchUsageSpec, SaysWhatIsWrong) {
  std::vector<std::string> arguments = GetParam().arguments;
  arguments.insert(arguments.begin(), "transfer");
  const ProcessResult result = RunProcess(PBS_BENCH, arguments);
  EXPECT_EQ(result.exit_status, 2);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Flags, BenchUsageSpec,
    testing::Values(
        RefusalCase{"unknown_flag", {"--frob"}, "--frob"},
        RefusalCase{"no_mib", {"--mib", "0"}, "--mib 0 is outside [1, 4096]"},
        RefusalCase{"no_rounds", {"--rounds=0"}, "--rounds 0 is outside [1, 1000]"},
        RefusalCase{"too_many_rounds", {"--rounds=1001"}, "--rounds 1001 is outside"},
        RefusalCase{"no_streams", {"--streams", "0"}, "--streams 0 is outside [1, 16]"},
        RefusalCase{
            "too_many_streams", {"--streams", "1,17"}, "--streams 17 is outside"},
        RefusalCase{"streams_twice", {"--streams", "2,2"}, "--streams 2 is given more"},
        RefusalCase{"small_chunks",
                    {"--chunk-bytes", "65535"},
                    "--chunk-bytes 65535 is outside [65536, 4194304]"},
        RefusalCase{"large_window",
                    {"--stream-window-bytes", "67108865"},
                    "--stream-window-bytes 67108865 is outside [65536, 67108864]"},
        RefusalCase{"negative_pid",
                    {"--server-pid", "-1"},
                    "--server-pid -1 is outside [0, 2147483647]"},
        RefusalCase{"direction", {"--direction", "up"}, "--direction: up not in"},
        RefusalCase{"checksums", {"--checksums", "yes"}, "--checksums: yes not in"},
        RefusalCase{"peers", {"--peers", "udp"}, "--peers: udp not in"},
        RefusalCase{
            "none_and_tcp", {"--peers", "none,tcp"}, "--peers none is beside others"},
        RefusalCase{"no_flight", {"--peers", "flight"}, "needs --flight COMMAND"},
        RefusalCase{
            "only_flight", {"--flight", "x"}, "--flight needs --peers with flight"}),
    testing_support::CaseName());

class BenchRefusalSpec : public BenchSpec,
                         public testing::WithParamInterface<RefusalCase> {};

TEST_P(BenchRefusalSpec, SaysWhatTheServerCannotDo) {
  const ProcessResult result = Bench(GetParam().arguments);
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Reasons, BenchRefusalSpec,
    testing::Values(
        RefusalCase{"unknown_model",
                    {"--model", "huge", "--direction", "download"},
                    "NOT_FOUND: --model \"huge\" is none of the server's 1 models"},
        RefusalCase{"more_streams_than_layers",
                    {"--direction", "download", "--streams", "4"},
                    "--streams 4 exceeds the 3 layers of model tiny"},
        RefusalCase{"no_such_flight",
                    {"--peers", "flight", "--flight", "/nowhere/python"},
                    "\"/nowhere/python\" did not print the pid of its server"},
        RefusalCase{"output",
                    {"--output", "/nowhere/x", "--direction", "upload"},
                    "--output /nowhere/x cannot be written"}),
    testing_support::CaseName());

TEST(BenchAloneSpec, WithoutAServerSaysWhatToStart) {
  const ProcessResult result =
      RunProcess(PBS_BENCH, {"transfer", "--server", "127.0.0.1:1"});
  EXPECT_EQ(result.exit_status, 1);
  EXPECT_THAT(result.err, HasSubstr("UNAVAILABLE: no server answers at 127.0.0.1:1"));
}

TEST(BenchAloneSpec, WithoutASubcommandNamesThem) {
  const ProcessResult result = RunProcess(PBS_BENCH, {});
  EXPECT_EQ(result.exit_status, 2);
  EXPECT_THAT(result.err, HasSubstr("subcommand is required"));
  EXPECT_THAT(RunProcess(PBS_BENCH, {"--help"}).out, HasSubstr("transfer"));
}

TEST(BenchAloneSpec, HelpNamesEveryFlag) {
  const ProcessResult result = RunProcess(PBS_BENCH, {"transfer", "--help"});
  EXPECT_EQ(result.exit_status, 0);
  for (const char* flag :
       {"--server ", "--server-pid", "--model", "--direction", "--streams",
        "--checksums", "--peers", "--flight", "--mib", "--rounds", "--chunk-bytes",
        "--stream-window-bytes", "--output"}) {
    EXPECT_THAT(result.out, HasSubstr(flag));
  }
}

}  // namespace
}  // namespace pbs
