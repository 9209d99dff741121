#include "client/cpp/decode/settings.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "client/cpp/decode/attention_flags.h"
#include "server/base/process.h"

namespace pbs::decode {
namespace {

constexpr int kExitUsage = 2;
constexpr double kTimeoutSecondsMax = 1'000'000;

// Flags that do not go into Settings as they are.
struct Raw {
  double timeout_seconds = 3600;
  AttentionFlags attention;
  std::string checksums = "on", kv_dtype, wire_dtype, compute = "auto",
              attn_factor = "applied";
};

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
  app.add_flag("--ignore-endpoint", settings.ignore_endpoint,
               "fetch from --server, not from where the ticket says, as through a port "
               "forward");
  app.add_option(
      "--shared-memory-socket", settings.shared_memory_socket,
      "take the cache from the shared memory of a server on this host, which "
      "has this shared_memory_socket");
  app.add_option("--then-tokens", settings.then_tokens_path,
                 "a file with a JSON list of token ids to feed after the prompt");
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
         "--wire-dtype", raw.wire_dtype,
         "how the cache travels: f8_e4m3 is about half the bytes of bf16, and an "
         "approximation [--kv-dtype]")
      ->check(CLI::IsMember({"f8_e4m3"}));
  app.add_option("--page-tokens", settings.page_tokens,
                 "tokens that share a scale of --wire-dtype")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
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

// Moves `raw` into `settings`; a reason when the flags contradict each other.
std::string Finish(const Raw& raw, Settings& settings) {
  if (settings.tokens_path.empty() && settings.ticket_path.empty()) {
    return "one of --tokens and --ticket is required";
  }
  const std::string given = raw.attention.FirstGiven();
  if (!settings.ticket_path.empty() && !given.empty()) {
    return given + " cannot be used with --ticket: that prefill is done";
  }
  if (!settings.ticket_path.empty() && !settings.profile.empty()) {
    return "--profile cannot be used with --ticket: that prefill is done";
  }
  absl::StatusOr<v1::AttentionOptions> attention = raw.attention.Message();
  if (!attention.ok()) return std::string(attention.status().message());
  if (!settings.profile.empty() &&
      attention->method_case() != v1::AttentionOptions::METHOD_NOT_SET) {
    return "--profile and --method exclude each other";
  }
  settings.attention = *std::move(attention);
  settings.timeout = absl::Seconds(raw.timeout_seconds);
  settings.checksums = raw.checksums == "on";
  settings.wire_fp8 = !raw.wire_dtype.empty();
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
  raw.attention.AddTo(app);
  app.add_option("--profile", settings.profile,
                 "instead of --method: a profile of the model; paper is pbs as "
                 "published");
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
