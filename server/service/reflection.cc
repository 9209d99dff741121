#include "server/service/reflection.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <memory>
#include <utility>
#include <vector>

namespace pbs::server {

void ReflectionOption::UpdatePlugins(
    std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) {
  auto own = std::make_unique<grpc::reflection::ProtoServerReflectionPlugin>();
  std::erase_if(*plugins,
                [&](const auto& plugin) { return plugin->name() == own->name(); });
  if (enabled_) plugins->push_back(std::move(own));
}

}  // namespace pbs::server
