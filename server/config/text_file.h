// Reads a small text file that an operator names.
//
// Threading: stateless. Memory: the file, at most `bytes_max` + 1.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pbs::server {

// The text of a regular file. Errors begin with `kind` and `path`: NotFound, or
// InvalidArgument when it is no regular file, cannot be read or is longer than
// `bytes_max`.
absl::StatusOr<std::string> ReadTextFile(absl::string_view kind,
                                         const std::string& path, int64_t bytes_max);

}  // namespace pbs::server
