// Spec: server/model/model_config.h. Whatever config.json says, the answer is a model
// that can be planned, or a refusal with a reason.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "pbs/attention.h"
#include "server/model/model_config.h"
#include "server/model/rope.h"

namespace {

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_model_config: %s\n", what);
  std::abort();
}

void RequireUsable(const pbs::ModelConfig& config) {
  pbs::AttentionProblem problem;
  problem.shape = {.num_heads = config.num_heads,
                   .num_kv_heads = config.num_kv_heads,
                   .head_dim = config.head_dim,
                   .sequences = {{config.max_tokens, config.max_tokens}}};
  Require(ValidateProblem(problem).ok(), "accepts a shape that no plan accepts");
  for (double frequency : pbs::InverseFrequencies(config.rope, config.head_dim)) {
    Require(std::isfinite(frequency) && frequency >= 0, "an unusable frequency");
  }
  Require(std::isfinite(config.rope.attention_factor), "an unusable attention factor");
  Require(!pbs::CanonicalArchitecture(config).empty(), "no canonical form");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto config =
      pbs::ParseModelConfig({reinterpret_cast<const char*>(data), size});
  if (config.ok()) {
    RequireUsable(*config);
    return 0;
  }
  const pbs::StatusCode code = config.status().code();
  Require(code == pbs::StatusCode::kInvalidArgument ||
              code == pbs::StatusCode::kUnimplemented,
          "refuses with this code");
  Require(!config.status().message().empty(), "refuses without a reason");
  return 0;
}
