// Prints what the server understands of config.json files, for comparison with
// transformers: one line of JSON for each, {"error": TEXT} for one that is refused.
//
//   config_dump CONFIG.json...
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "server/model/file.h"
#include "server/model/model_config.h"
#include "server/model/rope.h"

namespace pbs {
namespace {

StatusOr<nlohmann::json> Describe(const std::string& path) {
  PBS_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kConfigBytesMax));
  PBS_ASSIGN_OR_RETURN(const ModelConfig config, ParseModelConfig(text));
  return nlohmann::json{
      {"architecture", ArchitectureName(config.architecture)},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.hidden_size},
      {"intermediate_size", config.intermediate_size},
      {"num_hidden_layers", config.num_layers},
      {"num_attention_heads", config.num_heads},
      {"num_key_value_heads", config.num_kv_heads},
      {"head_dim", config.head_dim},
      {"rms_norm_eps", config.rms_norm_epsilon},
      {"tie_word_embeddings", config.tied_embeddings},
      {"tokens_max", config.max_tokens},
      {"eos_token_ids", config.eos_token_ids},
      {"inverse_frequencies", InverseFrequencies(config.rope, config.head_dim)},
      {"attention_factor", config.rope.attention_factor},
      {"notes", config.notes}};
}

}  // namespace
}  // namespace pbs

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const auto described = pbs::Describe(argv[i]);
    const nlohmann::json line =
        described.ok() ? *described
                       : nlohmann::json{{"error", described.status().message()}};
    std::printf("%s\n", line.dump().c_str());
  }
  return argc > 1 ? 0 : 2;
}
