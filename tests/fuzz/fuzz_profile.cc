// Spec: server/config/profile_file.h. Whatever the file says, the answer is a profile
// that can be planned, or InvalidArgument with a reason.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>

#include "absl/strings/string_view.h"
#include "pbs/attention.h"
#include "server/config/profile_file.h"

namespace {

// As in the corpus: two layers of two query heads.
const pbs::server::ProfiledModel kModel = {"d1", 2, 2, 1, 64};

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_profile: %s\n", what);
  std::abort();
}

void RequireUsable(const pbs::server::Profile& profile) {
  pbs::AttentionProblem problem;
  problem.shape = {kModel.num_heads, kModel.num_kv_heads, kModel.head_dim, {{1, 1}}};
  problem.options = profile.options;
  problem.has_head_thresholds = !profile.head_thresholds.empty();
  Require(ValidateProblem(problem).ok(), "accepts options that no plan accepts");
  Require(profile.head_thresholds.empty() == profile.thresholds_digest.empty(),
          "a digest without thresholds, or thresholds without one");
  if (profile.head_thresholds.empty()) return;
  const std::span<const float> thresholds = profile.head_thresholds;
  Require(thresholds.size() == 4, "accepts another number of heads");
  for (const size_t layer : {0, 1}) {
    const auto heads = thresholds.subspan(layer * 2, 2);
    Require(ValidateHeadThresholds(problem, heads).ok(),
            "accepts thresholds that no run accepts");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto profile = pbs::server::ParseProfile(text, kModel);
  if (profile.ok()) {
    RequireUsable(*profile);
  } else {
    Require(profile.status().code() == absl::StatusCode::kInvalidArgument,
            "refuses with this code");
    Require(!profile.status().message().empty(), "refuses without a reason");
  }
  return 0;
}
