// Answers calls of methods that this server does not have with UNIMPLEMENTED, and logs
// and counts them like all other calls.
//
// Threading: gRPC calls it from its threads. Memory: none.
#pragma once

#include <grpcpp/generic/async_generic_service.h>

#include "server/service/service_context.h"

namespace pbs::server {

class UnknownMethods final : public grpc::CallbackGenericService {
 public:
  explicit UnknownMethods(ServiceContext& service) : service_(service) {}

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override;

 private:
  ServiceContext& service_;
};

}  // namespace pbs::server
