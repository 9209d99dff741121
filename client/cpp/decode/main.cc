// pbs-decode: the reference decode tier.
//
// Exit status: 0 decoded, 1 it could not, 2 for a wrong command line.
#include <cstdint>
#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"
#include "client/cpp/decode/files.h"
#include "client/cpp/decode/progress.h"
#include "client/cpp/decode/report.h"
#include "client/cpp/decode/run_prompt.h"
#include "client/cpp/decode/settings.h"
#include "pbs/cpu_backend.h"
#include "server/base/status.h"
#include "server/model/model.h"

namespace pbs::decode {
namespace {

using server::ToAbsl;

absl::StatusOr<std::unique_ptr<Model>> LoadModel(const Settings& settings,
                                                 Backend& backend, Progress& progress) {
  ModelOptions options;
  options.kv_dtype = settings.kv_dtype;
  options.rope = settings.rope;
  options.control.progress = [&](int64_t done, int64_t total) {
    const auto megabytes = [](int64_t bytes) { return static_cast<int>(bytes >> 20); };
    progress.Show(absl::StrCat("loading ", settings.model_path, " ",
                               Bar(megabytes(done), megabytes(total)), " MiB"));
  };
  auto model = ToAbsl(Model::Load(settings.model_path, options, backend));
  progress.Clear();
  return model;
}

absl::Status Run(const Settings& settings) {
  Progress progress(settings.quiet);
  PBS_ABSL_ASSIGN_OR_RETURN(const auto backend,
                            ToAbsl(CreateCpuBackend(settings.backend)));
  PBS_ABSL_ASSIGN_OR_RETURN(const auto model, LoadModel(settings, *backend, progress));
  PBS_ABSL_ASSIGN_OR_RETURN(
      const auto client,
      client::Client::Connect({.address = settings.server,
                               .follow_endpoints = !settings.ignore_endpoint,
                               .shared_memory_socket = settings.shared_memory_socket}));
  PBS_ABSL_ASSIGN_OR_RETURN(const Outcome outcome,
                            RunPrompt(settings, *model, *client, progress));
  if (!settings.output_path.empty()) {
    PBS_ABSL_RETURN_IF_ERROR(
        WriteText(settings.output_path, TokenList(outcome.tokens) + "\n"));
  }
  const std::string report = settings.json
                                 ? JsonReport(outcome, settings.checksums)
                                 : TextReport(outcome, *model, settings.checksums);
  std::fputs(report.c_str(), stdout);
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  const ParsedFlags flags = ParseFlags(argc, argv);
  if (!flags.settings.has_value()) return flags.exit_code;
  const absl::Status status = Run(*flags.settings);
  if (status.ok()) return 0;
  std::fprintf(stderr, "pbs-decode: %s: %s\n",
               absl::StatusCodeToString(status.code()).c_str(),
               std::string(status.message()).c_str());
  return 1;
}

}  // namespace
}  // namespace pbs::decode

int main(int argc, char** argv) { return pbs::decode::Main(argc, argv); }
