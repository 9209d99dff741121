#include "server/config/profile_file.h"

#include <google/protobuf/util/json_util.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "pbs/attention.h"
#include "pbs/v1/profile.pb.h"
#include "server/base/status.h"
#include "server/codec/attention_options.h"
#include "server/codec/thresholds_digest.h"
#include "server/config/names.h"
#include "server/config/text_file.h"

namespace pbs::server {
namespace {

absl::Status CheckName(const v1::Profile& wire) {
  if (!IsName(wire.name())) {
    return absl::InvalidArgumentError(
        absl::StrCat("name \"", wire.name(), "\" is not ", kNameRule));
  }
  if (wire.name() != kPaperProfile) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("name \"", kPaperProfile, "\" is built in; take another"));
}

absl::Status CheckOptions(const AttentionOptions& options, bool has_head_thresholds,
                          const ProfiledModel& model) {
  if (options.use_given_order || options.use_given_lists) {
    return absl::InvalidArgumentError(
        "use_given_order and use_given_lists need tensors that only a request has; a "
        "profile has them false");
  }
  AttentionProblem problem;
  problem.shape = {model.num_heads, model.num_kv_heads, model.head_dim, {{1, 1}}};
  problem.options = options;
  problem.has_head_thresholds = has_head_thresholds;
  return ToAbsl(ValidateProblem(problem));
}

absl::StatusOr<Profile> Decode(const v1::Profile& wire, const ProfiledModel& model) {
  PBS_ABSL_RETURN_IF_ERROR(CheckName(wire));
  if (wire.model_digest() != model.digest) {
    return absl::InvalidArgumentError(
        absl::StrCat("model_digest \"", wire.model_digest(), "\" is not the model's, ",
                     model.digest));
  }
  if (wire.attention().method_case() == v1::AttentionOptions::METHOD_NOT_SET) {
    return absl::InvalidArgumentError("attention names no method");
  }
  if (wire.layers_size() > 0 && SetsThreshold(wire.attention())) {
    return absl::InvalidArgumentError(kTwoThresholds);
  }
  PBS_ABSL_ASSIGN_OR_RETURN(const AttentionProfile attention,
                            DecodeAttentionProfile(WithPrefillTail(wire.attention())));
  PBS_ABSL_ASSIGN_OR_RETURN(
      std::vector<float> thresholds,
      DecodeHeadThresholds(wire.layers(), model.num_layers, model.num_heads));
  PBS_ABSL_RETURN_IF_ERROR(CheckOptions(attention.options, !thresholds.empty(), model));
  Profile profile = {.name = wire.name(),
                     .options = attention.options,
                     .dense_fallback = attention.dense_fallback};
  if (thresholds.empty()) return profile;
  if (AreEqual(thresholds)) {
    profile.options.threshold = thresholds.front();
    return profile;
  }
  profile.thresholds_digest = ThresholdsDigest(thresholds);
  profile.head_thresholds = std::move(thresholds);
  return profile;
}

}  // namespace

absl::StatusOr<Profile> ParseProfile(absl::string_view json,
                                     const ProfiledModel& model) {
  v1::Profile wire;
  const auto status = google::protobuf::util::JsonStringToMessage(
      google::protobuf::StringPiece(json.data(), json.size()), &wire);
  if (status.ok()) return Decode(wire, model);
  // Of several lines, which show the place in the text.
  const std::string message(status.message().data(), status.message().size());
  return absl::InvalidArgumentError(
      absl::StrCat("it is not the JSON of a profile: ",
                   absl::CHexEscape(message.substr(0, message.find('\n')))));
}

absl::StatusOr<Profile> LoadProfile(const std::string& path,
                                    const ProfiledModel& model) {
  PBS_ABSL_ASSIGN_OR_RETURN(const std::string text,
                            ReadTextFile("profile", path, kProfileBytesMax));
  absl::StatusOr<Profile> profile = ParseProfile(text, model);
  if (profile.ok()) return profile;
  return absl::InvalidArgumentError(
      absl::StrCat("profile ", path, ": ", profile.status().message()));
}

}  // namespace pbs::server
