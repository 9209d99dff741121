// Names of models and of their profiles.
//
// Threading: pure functions.
#pragma once

#include <algorithm>
#include <cstddef>

#include "absl/strings/ascii.h"
#include "absl/strings/string_view.h"

namespace pbs::server {

inline constexpr size_t kNameBytesMax = 64;
inline constexpr char kNameRule[] = "1 to 64 of [A-Za-z0-9._-]";

inline bool IsName(absl::string_view name) {
  return !name.empty() && name.size() <= kNameBytesMax &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' ||
                  c == '_' || c == '-';
         });
}

}  // namespace pbs::server
