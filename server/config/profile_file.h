// Files of profiles: the JSON of pbs.v1.Profile, for one model.
//
// Threading: stateless. Memory: a file is read whole, at most kProfileBytesMax.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/engine/profile.h"

namespace pbs::server {

inline constexpr int64_t kProfileBytesMax = 8 << 20;

// The model that a profile must fit.
struct ProfiledModel {
  std::string digest;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
};

// The profile in `json`. Head thresholds that are all equal become the threshold of its
// options. InvalidArgument names field, value and limit: unknown fields; a name of
// other characters or that of kPaperProfile; another model's digest; options that no
// method has; a number of layers or heads that is not the model's; a threshold outside
// (0, 1].
absl::StatusOr<Profile> ParseProfile(absl::string_view json,
                                     const ProfiledModel& model);

// The same from a regular file. NotFound, or InvalidArgument that begins with the path.
absl::StatusOr<Profile> LoadProfile(const std::string& path,
                                    const ProfiledModel& model);

}  // namespace pbs::server
