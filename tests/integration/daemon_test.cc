// Spec: the life of pbs-prefilld (server/main.cc): how it starts, refuses to start,
// drains and ends. Every case is a process of its own.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <future>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/config.h"
#include "client/cpp/client.h"
#include "pbs/v1/attention.grpc.pb.h"
#include "pbs/v1/kv.grpc.pb.h"
#include "tests/support/attend_headers.h"
#include "tests/support/case_name.h"
#include "tests/support/server_process.h"
#include "tests/support/tiny_model.h"

namespace pbs {
namespace {

using testing::HasSubstr;
using testing_support::ServerProcess;
using testing_support::TinyModelFolder;

std::vector<std::string> With(std::vector<std::string> arguments,
                              const std::vector<std::string>& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

class DaemonSpec : public testing::Test {
 protected:
  // No metrics port: closing one takes up to two seconds.
  std::vector<std::string> Usual() const {
    return {"--backend",        "cpu", "--threads", "1",
            "--metrics-listen", "off", "--model",   "tiny=" + folder_.path()};
  }
  static std::unique_ptr<client::Client> Connect(ServerProcess& server) {
    auto connected = client::Client::Connect({.address = server.WaitForAddress()});
    EXPECT_TRUE(connected.ok()) << connected.status();
    return *std::move(connected);
  }
  static v1::PrefillRequest Request(int num_tokens, bool lease) {
    v1::PrefillRequest request;
    for (int i = 0; i < num_tokens; ++i) {
      request.add_token_ids(static_cast<uint32_t>(i % 128));
    }
    if (lease) request.mutable_delivery()->mutable_lease();
    return request;
  }
  // A finished prefill whose lease is held.
  static v1::KvTicket HoldLease(client::Client& client) {
    client::PrefillObserver observer;
    const auto done = client.Prefill(Request(20, true), observer);
    EXPECT_TRUE(done.ok()) << done.status();
    return done->ticket();
  }

  const TinyModelFolder folder_;
};

// ---- start

TEST_F(DaemonSpec, ServesItsModels) {
  ServerProcess server(PBS_PREFILLD, Usual());
  const auto client = Connect(server);
  const auto models = client->ListModels();
  ASSERT_TRUE(models.ok()) << models.status();
  ASSERT_EQ(models->models_size(), 1);
  EXPECT_EQ(models->models(0).name(), "tiny");
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
}

TEST_F(DaemonSpec, WithoutAModelServesRawAttention) {
  ServerProcess server(PBS_PREFILLD, {"--threads", "1", "--metrics-listen", "off"});
  const auto client = Connect(server);
  EXPECT_EQ(client->ListModels()->models_size(), 0);
  EXPECT_TRUE(server.WaitForEvent("backend_auto").is_object());
  server.Signal(SIGINT);
  EXPECT_EQ(server.Wait(), 0);
}

struct RefusalCase {
  const char* name;
  std::vector<std::string> arguments;
  int exit_status;
  const char* message;  // part of start_failed's; "" when it ends before its log
};

class RefusedStartSpec : public DaemonSpec,
                         public testing::WithParamInterface<RefusalCase> {};

TEST_P(RefusedStartSpec, EndsWithTheReason) {
  ServerProcess server(PBS_PREFILLD,
                       With({"--metrics-listen", "off"}, GetParam().arguments));
  if (GetParam().message[0] != '\0') {
    const nlohmann::json failed = server.WaitForEvent("start_failed");
    ASSERT_TRUE(failed.is_object());
    EXPECT_THAT(failed.value("message", ""), HasSubstr(GetParam().message));
  }
  EXPECT_EQ(server.Wait(), GetParam().exit_status);
}

INSTANTIATE_TEST_SUITE_P(
    Reasons, RefusedStartSpec,
    testing::Values(
        RefusalCase{"missing_model", {"--model", "x=/nowhere"}, 1, "model x: "},
        RefusalCase{
            "cuda_without_its_module",
            {"--backend", "cuda", "--set", "cuda.module=/nowhere.so"},
            1,
            "backend cuda: cannot load the CUDA module (cuda.module): /nowhere"},
        RefusalCase{"a_module_of_something_else",
                    {"--backend", "cuda", "--set", "cuda.module=libm.so.6"},
                    1,
                    "libm.so.6 is no CUDA module of this project"},
        RefusalCase{"foreign_address",
                    {"--listen", "192.0.2.1:1"},
                    1,
                    "listen 192.0.2.1:1 cannot be bound: this machine does not have "
                    "the address"},
        RefusalCase{"foreign_metrics_address",
                    {"--metrics-listen", "192.0.2.1:1"},
                    1,
                    "metrics_listen 192.0.2.1:1 cannot be bound"},
        RefusalCase{"unknown_flag", {"--frob"}, 2, ""},
        RefusalCase{"negative_threads", {"--threads", "-3"}, 2, ""},
        RefusalCase{"model_without_path", {"--model", "x"}, 2, ""},
        RefusalCase{"missing_config", {"--config", "/nowhere.json"}, 2, ""},
        RefusalCase{"bad_set", {"--set", "lease.ttl=1"}, 2, ""},
        RefusalCase{"invalid_config", {"--set", "lease.leases_max=0"}, 2, ""},
        RefusalCase{"valid_config", {"--check-config"}, 0, ""}),
    testing_support::CaseName());

// ---- drain

TEST_F(DaemonSpec, DrainServesHeldLeasesAndRefusesNewWork) {
  ServerProcess server(PBS_PREFILLD, Usual());
  const auto client = Connect(server);
  const v1::KvTicket ticket = HoldLease(*client);
  server.Signal(SIGTERM);
  ASSERT_TRUE(server.WaitForEvent("draining").is_object());

  client::PrefillObserver observer;
  absl::Status refused;
  do {  // the event is written a moment before the door closes
    refused = client->Prefill(Request(20, false), observer).status();
  } while (refused.ok());
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(client->Describe(ticket).ok());
  EXPECT_EQ(client->Release(ticket), absl::OkStatus());
  EXPECT_EQ(server.Wait(), 0);  // at once: a minute is allowed
  EXPECT_TRUE(server.WaitForEvent("drained").value("leases_released", false));
}

TEST_F(DaemonSpec, DrainEndsAtItsLimit) {
  ServerProcess server(PBS_PREFILLD, With(Usual(), {"--set", "drain_seconds_max=0"}));
  HoldLease(*Connect(server));
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_FALSE(server.WaitForEvent("drained").value("leases_released", true));
}

TEST_F(DaemonSpec, ASecondSignalEndsItAtOnce) {
  ServerProcess server(PBS_PREFILLD, Usual());
  HoldLease(*Connect(server));
  server.Signal(SIGTERM);
  ASSERT_TRUE(server.WaitForEvent("draining").is_object());
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 128 + SIGTERM);
}

// Waits in OnAdmitted's promise, so that a test knows what the server has let in.
struct Gate final : client::PrefillObserver {
  void OnAdmitted(const v1::Admitted&) override { admitted.set_value(); }
  std::promise<void> admitted;
};

TEST_F(DaemonSpec, DrainUnderLoadLosesNoAdmittedRequestAndRefusesLaterOnes) {
  ServerProcess server(PBS_PREFILLD, Usual());
  const auto client = Connect(server);
  const v1::KvTicket ticket =
      HoldLease(*client);  // keeps the door open to be refused at
  constexpr int kRequests = 12;
  Gate gates[kRequests];
  std::vector<absl::StatusOr<v1::Done>> results(kRequests);
  std::vector<std::thread> callers;
  for (int i = 0; i < kRequests; ++i) {
    callers.emplace_back(
        [&, i] { results[i] = client->Prefill(Request(1000, i % 2 == 1), gates[i]); });
  }
  for (Gate& gate : gates) gate.admitted.get_future().wait();
  server.Signal(SIGTERM);
  ASSERT_TRUE(server.WaitForEvent("draining").is_object());
  client::PrefillObserver observer;
  absl::Status late;
  do {  // the event is written a moment before the door closes
    late = client->Prefill(Request(1, false), observer).status();
  } while (late.ok());
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(client->Prefill(Request(1, false), observer).status(),
              absl::UnavailableError("draining: this server takes no new work"));
  }
  for (std::thread& caller : callers) caller.join();
  for (int i = 0; i < kRequests; ++i) {
    ASSERT_TRUE(results[i].ok()) << results[i].status();
    if (i % 2 == 0) continue;
    EXPECT_TRUE(client->Release(results[i]->ticket()).ok());
  }
  EXPECT_TRUE(client->Release(ticket).ok());
  EXPECT_EQ(server.Wait(), 0);
  const nlohmann::json drained = server.WaitForEvent("drained");
  EXPECT_TRUE(drained.value("work_finished", false));
  EXPECT_TRUE(drained.value("leases_released", false));
}

// ---- uploads and work that a drain meets

v1::AttendHeader Synthetic(int32_t repetitions) {
  v1::AttendHeader header = testing_support::SyntheticHeader(8, 8, 2048, 64);
  header.mutable_options()->mutable_dense();
  header.set_repetitions(repetitions);
  return header;
}

// An Attend that has sent its header and its first tensor, as it comes to a server that
// lets nobody send more than 64 KiB ahead: it has taken the header.
class HalfUpload {
 public:
  static std::vector<std::string> ServerFlags() {
    return {"--set", "transport.stream_window_bytes=65536"};
  }
  explicit HalfUpload(const std::string& address)
      : stub_(v1::Attention::NewStub(
            grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))),
        stream_(stub_->Attend(&context_)) {
    v1::AttendRequest request;
    *request.mutable_header() = testing_support::UploadHeader({1, 4, kTokens, 64});
    EXPECT_TRUE(stream_->Write(request));
    Send(v1::Q);
  }

  grpc::Status Finish() {
    Send(v1::K);
    Send(v1::V);
    stream_->WritesDone();
    return AwaitEnd();
  }
  grpc::Status AwaitEnd() {
    v1::AttendResponse response;
    while (stream_->Read(&response)) {
    }
    return stream_->Finish();
  }

 private:
  static constexpr int64_t kTokens = 2048;
  static constexpr int64_t kTensorBytes = 4 * kTokens * 64 * 4;  // 2 MiB
  static constexpr int64_t kPieceBytes = 64 << 10;

  void Send(v1::TensorName tensor) {
    v1::AttendRequest request;
    request.mutable_chunk()->set_tensor(tensor);
    request.mutable_chunk()->set_data(std::string(kPieceBytes, '\0'));
    for (int64_t at = 0; at < kTensorBytes; at += kPieceBytes) {
      request.mutable_chunk()->set_offset(static_cast<uint64_t>(at));
      EXPECT_TRUE(stream_->Write(request));
    }
  }

  grpc::ClientContext context_;
  const std::unique_ptr<v1::Attention::Stub> stub_;
  const std::unique_ptr<grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>>
      stream_;
};

TEST_F(DaemonSpec, DrainTakesTheRestOfAnUploadAndRunsIt) {
  ServerProcess server(PBS_PREFILLD, With(Usual(), HalfUpload::ServerFlags()));
  const std::string address = server.WaitForAddress();
  HalfUpload upload(address);
  server.Signal(SIGTERM);
  ASSERT_TRUE(server.WaitForEvent("draining").is_object());
  const grpc::Status status = upload.Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_TRUE(server.WaitForEvent("drained").value("work_finished", false));
}

TEST_F(DaemonSpec, AnUploadThatOutlastsTheDrainIsCutAndSaidSo) {
  ServerProcess server(PBS_PREFILLD, With(With(Usual(), HalfUpload::ServerFlags()),
                                          {"--set", "drain_seconds_max=0"}));
  HalfUpload upload(server.WaitForAddress());
  server.Signal(SIGTERM);
  const grpc::Status status = upload.AwaitEnd();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "the server is shutting down");
  EXPECT_EQ(server.Wait(), 1);
  const nlohmann::json cut = server.WaitForEvent("drain_cut");
  ASSERT_TRUE(cut.is_object());
  EXPECT_EQ(cut.value("uploads", 0), 1);
  EXPECT_FALSE(server.WaitForEvent("drained").value("work_finished", true));
}

// Notes how many requests were ahead.
struct QueueObserver final : client::PrefillObserver {
  void OnAdmitted(const v1::Admitted& admitted) override {
    position.set_value(admitted.queue_position());
  }
  std::promise<int> position;
};

TEST_F(DaemonSpec, WorkThatOutlastsTheDrainIsCutAndSaidSo) {
  ServerProcess server(PBS_PREFILLD, With(Usual(), {"--set", "drain_seconds_max=0"}));
  const auto client = Connect(server);
  auto attend = std::async(std::launch::async, [&] {
    struct Nowhere final : client::TensorTarget {
      std::span<std::byte> Tensor(const v1::TensorSpec&, int64_t bytes) override {
        array.resize(static_cast<size_t>(bytes));
        return array;
      }
      std::vector<std::byte> array;
    } nowhere;
    return client->Attend(Synthetic(/*repetitions=*/1000), {}, nowhere).status();
  });
  // Until one waits behind the Attend, which takes long.
  std::future<absl::Status> prefill;
  QueueObserver observer;
  int position = 0;
  while (position == 0) {
    if (prefill.valid()) {
      EXPECT_TRUE(prefill.get().ok());
    }
    observer = QueueObserver();
    prefill = std::async(std::launch::async, [&] {
      return client->Prefill(Request(20, false), observer).status();
    });
    position = observer.position.get_future().get();
  }
  server.Signal(SIGTERM);
  EXPECT_EQ(prefill.get(), absl::UnavailableError("the server is shutting down"));
  EXPECT_EQ(attend.get(), absl::UnavailableError("the server is shutting down"));
  EXPECT_EQ(server.Wait(), 1);
  EXPECT_EQ(server.WaitForEvent("drain_cut").value("jobs", 0), 2);
  EXPECT_FALSE(server.WaitForEvent("drained").value("work_finished", true));
}

// ---- a server that is gone

TEST_F(DaemonSpec, AClientGivesUpAServerThatIsFrozen) {
  ServerProcess server(PBS_PREFILLD, Usual());
  auto client = client::Client::Connect({.address = server.WaitForAddress(),
                                         .keepalive = absl::Seconds(1),
                                         .keepalive_timeout = absl::Seconds(1)});
  ASSERT_TRUE(client.ok()) << client.status();
  server.Freeze();
  client::PrefillObserver observer;
  EXPECT_TRUE(
      absl::IsUnavailable((*client)->Prefill(Request(20, false), observer).status()));
  server.Signal(SIGCONT);
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
}

TEST(ClientOptionsSpec, ADeadServerIsFoundWithinAMinute) {
  const client::ClientOptions options;
  EXPECT_LE(options.keepalive + options.keepalive_timeout, absl::Minutes(1));
}

// ---- memory

// A field of /proc/PID/status, in bytes.
int64_t ProcessBytes(pid_t pid, const std::string& field) {
  std::ifstream status("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field + ":"))
      return std::stoll(line.substr(field.size() + 1)) << 10;
  }
  ADD_FAILURE() << "no " << field;
  return 0;
}

// AddressSanitizer's allocator puts red zones and shadow beside every block: the same
// streams grow its process by 26 .. 28 MB where an ordinary one grows by 6 .. 8.
#ifdef ABSL_HAVE_ADDRESS_SANITIZER
constexpr int64_t kAllocatorFactor = 2;
#else
constexpr int64_t kAllocatorFactor = 1;
#endif

// Spec: server/service/memory_formula.h. Each stream holds its state, a message that
// waits for the reader, and half of them two chunks that are laid out anew.
TEST_F(DaemonSpec, TwoHundredUnreadStreamsHoldWhatTheFormulaSays) {
  constexpr int kStreams = 200;
  constexpr int64_t kChunkBytes = 64 << 10;
  // Under AddressSanitizer what is freed is freed, as without it.
  ServerProcess server(PBS_PREFILLD,
                       With(Usual(), {"--set", "transport.chunk_bytes=65536"}),
                       {"ASAN_OPTIONS=quarantine_size_mb=0"});
  const auto client = Connect(server);
  client::PrefillObserver observer;
  const auto done = client->Prefill(Request(2000, true), observer);
  ASSERT_TRUE(done.ok()) << done.status();
  v1::FetchRequest request;
  *request.mutable_ticket() = done->ticket();
  struct Nowhere final : client::KvTarget {
    std::span<std::byte> Array(int32_t, v1::KvChunk::Kind, int64_t bytes) override {
      array.resize(static_cast<size_t>(bytes));
      return array;
    }
    std::vector<std::byte> array;
  } nowhere;
  ASSERT_TRUE(client->Fetch(request, nowhere).ok());  // warm

  const int64_t before = ProcessBytes(server.pid(), "VmRSS");
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // 64 KiB a stream, for good
  const std::string address = server.WaitForAddress();
  std::unique_ptr<v1::KvSource::Stub> stub;
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::KvChunk>>> readers;
  for (int i = 0; i < kStreams; ++i) {
    if (i % 50 == 0) {
      stub = v1::KvSource::NewStub(grpc::CreateCustomChannel(
          address, grpc::InsecureChannelCredentials(), arguments));
    }
    request.set_layout(i % 2 == 0 ? v1::HND : v1::NHD);
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    readers.push_back(stub->Fetch(contexts.back().get(), request));
    readers.back()->WaitForInitialMetadata();
  }
  ASSERT_TRUE(client->Fetch(request, nowhere).ok());  // nobody is in its way
  const int64_t grown = ProcessBytes(server.pid(), "VmRSS") - before;
  RecordProperty("grown_bytes", std::to_string(grown));
  constexpr int64_t kCallStateBytes = 64 << 10;
  EXPECT_LE(grown, kAllocatorFactor * kStreams * (kCallStateBytes + kChunkBytes));

  for (auto& context : contexts) context->TryCancel();
  for (auto& reader : readers) {
    v1::KvChunk chunk;
    while (reader->Read(&chunk)) {
    }
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  EXPECT_TRUE(client->Release(done->ticket()).ok());
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
}

}  // namespace
}  // namespace pbs
