// Typed, blocking client of a prefill node.
//
// Tensor bytes are sent from and received into the caller's memory; no protobuf message
// holds them.
//
// Threading: calls may run in parallel from several threads; each blocks its own.
// Memory: one chunk per call beside the caller's tensors.
// Errors: the server's code and message; Unavailable, for a server that cannot be
// reached, names the command to start.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cpp/kv_receiver.h"
#include "client/cpp/raw_stream.h"
#include "client/cpp/shared_region.h"
#include "pbs/v1/attention.pb.h"
#include "pbs/v1/kv.pb.h"
#include "pbs/v1/prefill.pb.h"

namespace pbs::client {

struct ClientOptions {
  std::string address = "127.0.0.1:50051";
  absl::Duration connect_timeout = absl::Seconds(5);
  // Time limit of every call but Prefill, Attend and Fetch; an earlier deadline of the
  // call wins.
  absl::Duration control_timeout = absl::Seconds(30);
  // The client pings a server that is silent for `keepalive`, and drops the connection
  // when it stays silent for `keepalive_timeout`, with and without calls under way.
  absl::Duration keepalive = absl::Seconds(30);
  absl::Duration keepalive_timeout = absl::Seconds(20);
  // Bytes that the server may send ahead per stream
  int32_t stream_window_bytes = 4 << 20;
  // Fetch() gives up after this many broken streams in a row that brought no chunk.
  int32_t resume_attempts = 3;
  // Calls about a leased cache go to KvTicket.endpoint; false: all go to `address`, as
  // through a port forward.
  bool follow_endpoints = true;
  // The server's shared_memory_socket on this host. Fetch() then takes the bytes from
  // shared memory; "": from the network.
  std::string shared_memory_socket = "";
};

class PrefillObserver {
 public:
  virtual ~PrefillObserver() = default;
  virtual void OnAdmitted(const v1::Admitted& /*admitted*/) {}
  virtual void OnLayer(const v1::LayerDone& /*layer*/) {}
};

// An uploaded tensor. `bytes` must not change until the call returns.
struct TensorInput {
  v1::TensorSpec spec;
  std::span<const std::byte> bytes;
};

// Memory for results.
class TensorTarget {
 public:
  virtual ~TensorTarget() = default;
  // Returns memory for the result, `bytes` long, or an empty span to refuse it.
  virtual std::span<std::byte> Tensor(const v1::TensorSpec& spec, int64_t bytes) = 0;
};

class Client {
 public:
  // Waits until the server answers. Unavailable when it does not.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const ClientOptions& options);

  absl::StatusOr<v1::ServerInfo> GetServerInfo(const CallTerms& terms = {});
  absl::StatusOr<v1::ListModelsResponse> ListModels(const CallTerms& terms = {});

  // `inline_kv` receives the cache of an inline delivery and is unused otherwise.
  // DataLoss as Fetch().
  absl::StatusOr<v1::Done> Prefill(const v1::PrefillRequest& request,
                                   PrefillObserver& observer,
                                   KvTarget* inline_kv = nullptr,
                                   const CallTerms& terms = {});

  // Fills in `header.tensors` from `inputs`. InvalidArgument when the size of an
  // input's bytes does not match its shape.
  absl::StatusOr<v1::AttendStats> Attend(v1::AttendHeader header,
                                         std::span<const TensorInput> inputs,
                                         TensorTarget& target,
                                         int32_t chunk_bytes = 1 << 20,
                                         const CallTerms& terms = {});

  absl::StatusOr<v1::KvDescriptor> Describe(const v1::KvTicket& ticket,
                                            const CallTerms& terms = {});
  // Fetches the ranges of `request`. It follows a prefill that still runs. It resumes a
  // broken stream after the last good chunk; the request has no `resume`. It renews the
  // lease (lease_keeper.h), so that the lease does not end before the fetch. With dtype
  // F8_E4M3 the target gets `stored` (F32, F16 or BF16; unset: as held), widened.
  // DataLoss when a chunk is missing, doubled or corrupt: the bytes of its layer must
  // then not be used.
  //
  // With ClientOptions::shared_memory_socket the bytes come from shared memory, unless
  // `request` says shared_memory false; never silently from the network instead. Errors
  // also as MapRegion() (shared_region.h).
  absl::Status Fetch(v1::FetchRequest request, KvTarget& target,
                     const CallTerms& terms = {}, std::optional<v1::DType> stored = {});
  absl::StatusOr<v1::KvLease> Renew(const v1::KvTicket& ticket,
                                    std::optional<int32_t> ttl_seconds,
                                    const CallTerms& terms = {});
  absl::Status Release(const v1::KvTicket& ticket, const CallTerms& terms = {});

 private:
  Client(const ClientOptions& options, std::shared_ptr<grpc::Channel> channel)
      : options_(options),
        channel_(std::move(channel)),
        regions_(options.shared_memory_socket) {}

  CallTerms ControlTerms(CallTerms terms) const;
  // The channel to the server that holds the ticket's cache.
  std::shared_ptr<grpc::Channel> ChannelOf(const v1::KvTicket& ticket);
  absl::Status FetchRanges(v1::FetchRequest request, const KvExpectation& expected,
                           KvReceiver& receiver, const CallTerms& terms);
  absl::Status FetchOnce(const v1::FetchRequest& request, const CallTerms& terms,
                         KvReceiver& receiver);
  absl::Status AwaitReturn(const v1::KvTicket& ticket, CallTerms terms);

  const ClientOptions options_;
  const std::shared_ptr<grpc::Channel> channel_;  // gRPC hands it out shared
  SharedRegions regions_;
  absl::Mutex mutex_;
  // By endpoint: one connection for each that a ticket named
  std::map<std::string, std::shared_ptr<grpc::Channel>> homes_ ABSL_GUARDED_BY(mutex_);
};

// Bytes of a tensor; InvalidArgument when its shape or dtype is invalid.
absl::StatusOr<int64_t> TensorBytes(const v1::TensorSpec& spec);

}  // namespace pbs::client
