// Spec: server/config. Whatever the file and the command line say, the answer is
// settings inside their limits or InvalidArgument with a reason.
//
// Input: JSON, then a zero byte, then one `--set` assignment per line.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "pbs/attention.h"
#include "server/config/config_source.h"
#include "server/config/server_settings.h"

namespace {

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_config: %s\n", what);
  std::abort();
}

void RequireRefusal(const absl::Status& status) {
  Require(status.code() == absl::StatusCode::kInvalidArgument,
          "refuses with this code");
  Require(!status.message().empty(), "refuses without a reason");
}

void RequireUsable(const pbs::server::ServerSettings& settings) {
  pbs::AttentionProblem problem;
  problem.shape = {
      .num_heads = 1, .num_kv_heads = 1, .head_dim = 64, .sequences = {{1, 1}}};
  problem.options = settings.service.default_attention.options;
  Require(ValidateProblem(problem).ok(), "accepts a profile that no plan accepts");
  Require(settings.service.limits.tokens_max >= 1, "accepts a limit of no tokens");
  for (const auto& model : settings.models) {
    Require(!model.name.empty() && !model.path.empty(), "accepts a nameless model");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(text, absl::MaxSplits('\0', 1));
  pbs::v1::ServerConfig config;
  if (const auto status = pbs::server::ParseConfigJson(parts.first, config);
      !status.ok()) {
    RequireRefusal(status);
    config.Clear();
  }
  for (absl::string_view assignment : absl::StrSplit(parts.second, '\n')) {
    const auto status = pbs::server::ApplySet(assignment, config);
    if (!status.ok()) RequireRefusal(status);
  }
  const auto settings = pbs::server::MakeSettings(config);
  if (settings.ok()) {
    RequireUsable(*settings);
  } else {
    RequireRefusal(settings.status());
  }
  return 0;
}
