// Spec: server/model/model_config.h. Whatever config.json says, the answer is a model
// that can be planned, or a refusal with a reason; so it is for generation_config.json.
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

void RequireReason(const pbs::Status& status) {
  if (status.ok()) return;
  Require(status.code() == pbs::StatusCode::kInvalidArgument ||
              status.code() == pbs::StatusCode::kUnimplemented,
          "refuses with this code");
  Require(!status.message().empty(), "refuses without a reason");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto config = pbs::ParseModelConfig(text);
  RequireReason(config.status());
  if (config.ok()) RequireUsable(*config);
  pbs::ModelConfig generating;
  generating.vocab_size = 1000;
  RequireReason(pbs::AddGenerationConfig(text, generating));
  for (int32_t token : generating.eos_token_ids) {
    Require(token >= 0 && token < 1000, "an end token outside of the vocabulary");
  }
  return 0;
}
