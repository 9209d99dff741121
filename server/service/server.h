// GrpcServer: the node's one port. Prefill, Attention, KvSource, health v1 and, when
// configured, reflection.
//
// Life: Create() listens at once. Until SetModels() every RPC but health answers
// UNAVAILABLE "loading models"; until SetServing(true) health answers NOT_SERVING. The
// health service "liveness" is SERVING from the first moment. Drain() refuses new work,
// lets admitted work finish and keeps serving leases; Shutdown() ends what is left.
//
// A port of its own accepts connections (connection_acceptor.h), at most
// transport.connections_max at once, and gives them to gRPC.
//
// Threading: all methods are safe from any thread; Shutdown() blocks and must not be
// called from a gRPC or executor thread. gRPC's threads decode, check and submit; they
// never wait for work.
// Memory: what a call holds is charged to the ledger before it is allocated; what gRPC
// buffers is bounded by memory_formula.h.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/engine/served_model.h"
#include "server/service/options.h"
#include "server/service/parts.h"

namespace pbs::server {

class GrpcServer {
 public:
  // Listens. Unavailable when the address cannot be bound, InvalidArgument when an
  // option is outside its range.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Create(
      const ServiceOptions& options, const ServiceParts& parts);
  // Shutdown(now) unless done before.
  ~GrpcServer();
  GrpcServer(const GrpcServer&) = delete;
  GrpcServer& operator=(const GrpcServer&) = delete;

  int port() const;

  // Accept requests, for these models (none: raw attention only). Once; the models must
  // outlive the server.
  void SetModels(std::vector<const ServedModel*> models);

  // Whether no call is open; watches of health do not count.
  bool IsIdle();

  // What health v1 answers for "" and for each service.
  void SetServing(bool serving);

  // From here on Prefill and Attend answer UNAVAILABLE "draining", an Attend that has
  // sent no header yet included; what was admitted goes on, and leases are served.
  // Calls `on_uploaded` once the engine has the job of every admitted upload: drain the
  // engine after that. Health is the caller's to set.
  void Drain(absl::AnyInvocable<void()> on_uploaded = [] {});

  // Ends the uploads under way with UNAVAILABLE; returns how many were admitted.
  int32_t CutUploads();

  // Calls still open after `grace` are cancelled; returns when all have ended.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit GrpcServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace pbs::server
