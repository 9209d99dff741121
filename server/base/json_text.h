// JSON text for lines that are built field by field.
//
// Threading: stateless.
#pragma once

#include <string>
#include <string_view>

namespace pbs::server {

// Appends `text` as a JSON string with its quotes: control characters, quotes and
// backslashes escaped, each byte that is not part of valid UTF-8 replaced by U+FFFD.
void AppendJsonString(std::string_view text, std::string& out);

}  // namespace pbs::server
