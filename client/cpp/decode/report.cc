#include "client/cpp/decode/report.h"

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace pbs::decode {
namespace {

struct Stage {
  const char* name;
  double seconds;
};

std::vector<Stage> StagesOf(const v1::StageSeconds& stages) {
  return {{"queue", stages.queue()},   {"embed", stages.embed()},
          {"qkv", stages.qkv()},       {"permute", stages.permute()},
          {"select", stages.select()}, {"attend", stages.attend()},
          {"mlp", stages.mlp()}};
}

// Heads of all layers that coverage_min made read every block.
int GuardedHeads(const v1::PrefillStats& stats) {
  int guarded = 0;
  for (const v1::HeadStats& heads : stats.layer_heads()) {
    guarded += heads.guarded_size();
  }
  return guarded;
}

std::string PrefillLines(const Outcome& outcome) {
  const v1::PrefillStats& stats = *outcome.prefill;
  std::string text = absl::StrFormat(
      "prefill   %.3f s on %s %s, density %.3f (share of the blocks of dense "
      "attention)\n",
      outcome.prefill_seconds, stats.backend(), stats.isa(), stats.density());
  for (const auto& [name, seconds] : StagesOf(stats.stages())) {
    if (seconds == 0) continue;
    absl::StrAppendFormat(&text, "  %-8s%8.3f s %5.1f %%\n", name, seconds,
                          100 * seconds / outcome.prefill_seconds);
  }
  if (stats.layer_heads_size() > 0) {
    absl::StrAppendFormat(
        &text, "  coverage %.4f of the attention of sampled rows, %d heads guarded\n",
        stats.coverage(), GuardedHeads(stats));
  }
  if (stats.fallback_layers() > 0) {
    absl::StrAppendFormat(&text, "  dense fallback in %d of %d layers\n",
                          stats.fallback_layers(), stats.layer_method_size());
  }
  return text;
}

}  // namespace

std::string TokenList(const std::vector<int32_t>& tokens) {
  return absl::StrCat("[", absl::StrJoin(tokens, ", "), "]");
}

std::string TextReport(const Outcome& outcome, const Model& model, bool checksums) {
  std::string text = absl::StrFormat("prompt    %d tokens, model %s (%s, %d layers)\n",
                                     outcome.prompt_tokens, outcome.model,
                                     ArchitectureName(model.config().architecture),
                                     model.config().num_layers);
  if (outcome.prefill.has_value()) absl::StrAppend(&text, PrefillLines(outcome));
  absl::StrAppendFormat(
      &text, "KV cache  %.2f MB of %s, %s, here %.3f s %s\n",
      1e-6 * static_cast<double>(outcome.kv_bytes), DTypeName(model.kv_dtype()),
      checksums ? "every chunk checked" : "not checked", outcome.kv_tail_seconds,
      outcome.prefill.has_value() ? "after the prefill's end"
                                  : "after it was asked for");
  absl::StrAppendFormat(&text, "decode    %d tokens in %.3f s, %d forward passes\n",
                        outcome.tokens.size(), outcome.decode_seconds,
                        outcome.decode_steps);
  absl::StrAppendFormat(&text, "tokens    %s\n", TokenList(outcome.tokens));
  return text;
}

std::string JsonReport(const Outcome& outcome, bool checksums) {
  const v1::KvTicket& ticket = outcome.ticket;
  nlohmann::json line = {{"model", outcome.model},
                         {"prompt_tokens", outcome.prompt_tokens},
                         {"tokens", outcome.tokens},
                         {"density", nullptr},
                         {"layer_density", nullptr},
                         {"stages", nullptr},
                         {"kv_bytes", outcome.kv_bytes},
                         {"checksums", checksums},
                         {"seconds",
                          {{"prefill", outcome.prefill_seconds},
                           {"kv_tail", outcome.kv_tail_seconds},
                           {"decode", outcome.decode_seconds}}},
                         {"ticket",
                          {{"handle", ticket.handle()},
                           {"epoch", std::to_string(ticket.epoch())},
                           {"model_digest", ticket.model_digest()},
                           {"sparsity_digest", ticket.sparsity_digest()},
                           {"endpoint", ticket.endpoint()}}}};
  if (outcome.prefill.has_value()) {
    const v1::PrefillStats& stats = *outcome.prefill;
    line["density"] = stats.density();
    line["layer_density"] =
        std::vector<double>(stats.layer_density().begin(), stats.layer_density().end());
    if (stats.layer_heads_size() > 0) {  // coverage was measured
      line["coverage"] = stats.coverage();
      line["guarded_heads"] = GuardedHeads(stats);
    }
    line["backend"] = stats.backend();
    line["isa"] = stats.isa();
    line["stages"] = nlohmann::json::object();
    for (const auto& [name, seconds] : StagesOf(stats.stages())) {
      line["stages"][name] = seconds;
    }
  }
  return line.dump() + "\n";
}

}  // namespace pbs::decode
