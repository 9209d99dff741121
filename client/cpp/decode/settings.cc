#include "client/cpp/decode/settings.h"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pbs/attention.h"
#include "server/base/process.h"

namespace pbs::decode {
namespace {

constexpr int kExitUsage = 2;
constexpr double kTimeoutSecondsMax = 1'000'000;

// Flags that do not go into Settings as they are.
struct Raw {
  double timeout_seconds = 3600;
  std::string method, scope, checksums = "on", kv_dtype, compute = "auto",
                             attn_factor = "applied";
  std::optional<int32_t> block_size, segment_size;
  std::optional<float> threshold;
  bool no_force_first_block = false;
};

std::vector<std::string> MethodNames() {
  std::vector<std::string> names;
  for (Method method : kMethods) names.emplace_back(MethodName(method));
  return names;
}

void AddConnection(CLI::App& app, Settings& settings, Raw& raw) {
  app.add_option("--server", settings.server, "host:port of pbs-prefilld")
      ->capture_default_str();
  app.add_option("--timeout", raw.timeout_seconds, "seconds for prefill and fetch")
      ->check(CLI::Range(0.001, kTimeoutSecondsMax))
      ->capture_default_str();
  app.add_option("--model", settings.model,
                 "name of the model at the server; required when it serves several");
  app.add_option("--model-path", settings.model_path,
                 "folder of the same model on this machine")
      ->required();
  auto* tokens = app.add_option("--tokens", settings.tokens_path,
                                "prompt: a file with a JSON list of token ids");
  auto* ticket =
      app.add_option("--ticket", settings.ticket_path,
                     "instead of a prompt: a file with the ticket of a held cache, as "
                     "printed by pbs-client prefill --lease");
  tokens->excludes(ticket);
  app.add_option("--then-tokens", settings.then_tokens_path,
                 "a file with a JSON list of token ids to feed after the prompt");
}

void AddAttention(CLI::App& app, Raw& raw) {
  app.add_option("--method", raw.method,
                 "attention of the prefill [the server's default profile]")
      ->check(CLI::IsMember(MethodNames()));
  app.add_option("--block-size", raw.block_size,
                 "tokens: power of two in 16..256 [128]");
  app.add_option("--segment-size", raw.segment_size,
                 "pbs: tokens, a multiple of the block size [256]");
  app.add_option("--threshold", raw.threshold,
                 "pbs, mean_pooling: attention mass to keep, (0, 1] [0.9]");
  app.add_option("--scope", raw.scope,
                 "pbs: one key order per KV head or per query head [kv_head]")
      ->check(CLI::IsMember({"kv_head", "query_head"}));
  app.add_flag("--no-force-first-block", raw.no_force_first_block,
               "pbs, mean_pooling: select the first block like any other");
}

void AddDecoding(CLI::App& app, Settings& settings, Raw& raw) {
  app.add_option("--max-new-tokens", settings.max_new_tokens, "tokens to decode")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_flag("--ignore-eos", settings.ignore_eos, "continue after an end token");
  app.add_option("--checksums", raw.checksums,
                 "on: corrupt chunks are refused; off: chunks are not checked")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str();
  app.add_flag("--keep-lease", settings.keep_lease,
               "keep the cache on the server until its lease expires");
  app.add_option("--kv-dtype", raw.kv_dtype,
                 "dtype of the cache here [the compute dtype]")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}));
  app.add_option(
         "--yarn-attn-factor", raw.attn_factor,
         "use of yarn's attn_factor, as models[].yarn_attn_factor of the server")
      ->check(CLI::IsMember({"applied", "ignored"}))
      ->capture_default_str();
  app.add_option("--compute-dtype", raw.compute, "dtype of the linear layers here")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str();
  app.add_option("--threads", settings.backend.num_threads,
                 "CPU threads; 0 = all this process may use")
      ->check(CLI::Range(0, kCpuThreadsMax))
      ->capture_default_str();
}

void AddResults(CLI::App& app, Settings& settings) {
  app.add_option("--output", settings.output_path,
                 "file to write with the decoded ids as a JSON list");
  app.add_flag("--json", settings.json, "one line of JSON on stdout, not a table");
  app.add_flag("--quiet", settings.quiet, "no progress on stderr");
}

// Sets what the options of `Message` share.
template <class Message>
void FillSelection(const Raw& raw, Message& options) {
  if (raw.block_size) options.set_block_size(*raw.block_size);
  if (raw.threshold) options.set_threshold(*raw.threshold);
  if (raw.no_force_first_block) options.set_force_first_block(false);
}

// The reason why an option does not belong to the method, or "".
std::string Misplaced(const Raw& raw) {
  const auto only_for = [&](bool given, const char* flag, const char* methods) {
    return given ? absl::StrCat(flag, " needs --method ", methods) : std::string();
  };
  const bool selects = raw.method == "pbs" || raw.method == "mean_pooling";
  const std::string all[] = {
      raw.method.empty() ? only_for(raw.block_size.has_value(), "--block-size",
                                    "dense, pbs or mean_pooling")
                         : "",
      !selects
          ? only_for(raw.threshold.has_value(), "--threshold", "pbs or mean_pooling")
          : "",
      !selects ? only_for(raw.no_force_first_block, "--no-force-first-block",
                          "pbs or mean_pooling")
               : "",
      raw.method != "pbs"
          ? only_for(raw.segment_size.has_value(), "--segment-size", "pbs")
          : "",
      raw.method != "pbs" ? only_for(!raw.scope.empty(), "--scope", "pbs") : ""};
  for (const std::string& reason : all) {
    if (!reason.empty()) return reason;
  }
  return "";
}

v1::AttentionOptions AttentionOf(const Raw& raw) {
  v1::AttentionOptions attention;
  if (raw.method == "dense") {
    auto& dense = *attention.mutable_dense();
    if (raw.block_size) dense.set_block_size(*raw.block_size);
  } else if (raw.method == "mean_pooling") {
    FillSelection(raw, *attention.mutable_mean_pooling());
  } else if (raw.method == "pbs") {
    auto& pbs = *attention.mutable_pbs();
    FillSelection(raw, pbs);
    if (raw.segment_size) pbs.set_segment_size(*raw.segment_size);
    if (raw.scope == "query_head") pbs.set_scope(v1::QUERY_HEAD);
    if (raw.scope == "kv_head") pbs.set_scope(v1::KV_HEAD);
  }
  return attention;
}

// Moves `raw` into `settings`; a reason when the flags contradict each other.
std::string Finish(const Raw& raw, Settings& settings) {
  if (settings.tokens_path.empty() && settings.ticket_path.empty()) {
    return "one of --tokens and --ticket is required";
  }
  if (!settings.ticket_path.empty() && !raw.method.empty()) {
    return "--method cannot be used with --ticket: that prefill is done";
  }
  if (std::string reason = Misplaced(raw); !reason.empty()) return reason;
  settings.timeout = absl::Seconds(raw.timeout_seconds);
  settings.attention = AttentionOf(raw);
  settings.checksums = raw.checksums == "on";
  if (!raw.kv_dtype.empty()) settings.kv_dtype = *ParseDType(raw.kv_dtype);
  if (raw.attn_factor == AttnFactorName(AttnFactor::kIgnored)) {
    settings.rope.attn_factor = AttnFactor::kIgnored;
  }
  settings.backend.compute = *ParseComputePreference(raw.compute);
  if (settings.backend.num_threads == 0) {
    settings.backend.num_threads = server::UsableCpus();
  }
  return "";
}

}  // namespace

ParsedFlags ParseFlags(int argc, char** argv) {
  CLI::App app(
      "The reference decode tier. It asks a pbs-prefilld to prefill a prompt, fetches "
      "the KV cache by ticket, checks it and decodes greedily",
      "pbs-decode");
  app.set_version_flag("--version", "pbs-decode " PBS_VERSION);
  Settings settings;
  Raw raw;
  AddConnection(app, settings, raw);
  AddAttention(app, raw);
  AddDecoding(app, settings, raw);
  AddResults(app, settings);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return {std::nullopt, app.exit(error) == 0 ? 0 : kExitUsage};
  }
  if (const std::string reason = Finish(raw, settings); !reason.empty()) {
    std::fprintf(stderr, "pbs-decode: %s\nRun with --help for more information.\n",
                 reason.c_str());
    return {std::nullopt, kExitUsage};
  }
  return {std::move(settings), 0};
}

}  // namespace pbs::decode
