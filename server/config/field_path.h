// Sets one field of a message by its dotted path, through reflection.
//
// Threading: stateless.
#pragma once

#include <google/protobuf/message.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace pbs::server {

// As ApplySet() (config_source.h); error messages do not begin with "--set". On error
// `message` is unspecified.
absl::Status SetField(absl::string_view path, absl::string_view value,
                      google::protobuf::Message& message);

}  // namespace pbs::server
