// Server reflection, off unless asked for.
//
// Linking gRPC's reflection library registers it for every server of the process, so
// the choice is made per server: this option takes its plugin out of the builder or
// puts one in.
#pragma once

#include <memory>
#include <vector>

#include <grpcpp/impl/server_builder_option.h>

namespace pbs::server {

class ReflectionOption final : public grpc::ServerBuilderOption {
 public:
  explicit ReflectionOption(bool enabled) : enabled_(enabled) {}

  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(
      std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override;

 private:
  const bool enabled_;
};

}  // namespace pbs::server
