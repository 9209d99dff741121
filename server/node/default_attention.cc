#include "server/node/default_attention.h"

#include "pbs/attention.h"

namespace pbs::server {
namespace {

// Whether it plans the smallest problem there is.
bool Runs(const Backend& backend, const AttentionOptions& options) {
  const BackendInfo& info = backend.info();
  const AttentionProblem problem = {
      {1, 1, info.head_dims.front(), {{1, 1}}}, info.dtypes.front(), options};
  return backend.Plan(problem).ok();
}

}  // namespace

ServerSettings WithDefaultAttention(const ServerSettings& settings,
                                    const Backend& backend) {
  ServerSettings chosen = settings;
  for (const AttentionProfile& profile : settings.default_attentions) {
    if (!Runs(backend, profile.options)) continue;
    chosen.service.default_attention = profile;
    break;
  }
  return chosen;
}

}  // namespace pbs::server
