// What pbs-decode says about a journey.
//
// Threading: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client/cpp/decode/journey.h"

namespace pbs::decode {

// A table for people, with a line end.
std::string TextReport(const Outcome& outcome, const Model& model, bool checksums);

// One line: model, prompt_tokens, tokens, density, layer_density, stages, kv_bytes,
// seconds, ticket, isa. Without a prefill, what belongs to it is null.
std::string JsonReport(const Outcome& outcome, bool checksums);

// "[1, 2, 3]"
std::string TokenList(const std::vector<int32_t>& tokens);

}  // namespace pbs::decode
