// Server reflection, off by default.
//
// Linking gRPC's reflection library registers its plugin for every server of the
// process. This option removes the plugin from one server's builder, or adds it.
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
