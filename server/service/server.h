// GrpcServer: the node's one port. Prefill, Attention, KvSource, health v1 and, when
// configured, reflection.
//
// Life: Create() listens at once. Until SetModels() every RPC except health answers
// UNAVAILABLE "loading models"; until SetServing(true) health answers NOT_SERVING. The
// health service "liveness" is SERVING from the start. Drain() refuses new work, lets
// admitted work finish and keeps serving leases. Shutdown() ends the remaining calls.
//
// A ConnectionAcceptor accepts at most transport.connections_max connections at once
// and passes them to gRPC.
//
// Threading: all methods are safe from any thread; Shutdown() blocks and must not be
// called from a gRPC or executor thread. gRPC's threads decode, check and submit; they
// never wait for work.
// Memory: a call charges its memory to the ledger before it allocates it;
// memory_formula.h bounds gRPC's buffers.
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
  // Calls Shutdown() without grace, unless it was called before.
  ~GrpcServer();
  GrpcServer(const GrpcServer&) = delete;
  GrpcServer& operator=(const GrpcServer&) = delete;

  int port() const;

  // Starts to accept requests for these models (none: raw attention only). Call it
  // once; the models must outlive the server.
  void SetModels(std::vector<const ServedModel*> models);

  // True when no call is open; health watches do not count.
  bool IsIdle();

  // Sets the answer of health v1 for "" and for each service.
  void SetServing(bool serving);

  // From here on Prefill and Attend answer UNAVAILABLE "draining", and so does an
  // Attend that has not sent its header. Admitted work continues, and leases are
  // served. Calls `on_uploaded` once the engine has the job of every admitted upload:
  // drain the engine only then. The caller sets health.
  void Drain(absl::AnyInvocable<void()> on_uploaded = [] {});

  // Ends the uploads under way with UNAVAILABLE; returns how many were admitted.
  int32_t CutUploads();

  // Cancels calls that are open after `grace`; returns when all calls have ended. Peers
  // that do not answer gRPC's goodbye delay it by at most a second of the grace.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit GrpcServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace pbs::server
