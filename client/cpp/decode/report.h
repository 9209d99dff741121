// Reports of pbs-decode about one prompt.
//
// Threading: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client/cpp/decode/run_prompt.h"

namespace pbs::decode {

// A table to read, with a line end.
std::string TextReport(const Outcome& outcome, const Model& model, bool checksums);

// One line: model, prompt_tokens, tokens, density, layer_density, stages, kv_bytes,
// seconds, ticket, isa. Fields of the prefill are null when there was none.
std::string JsonReport(const Outcome& outcome, bool checksums);

// "[1, 2, 3]"
std::string TokenList(const std::vector<int32_t>& tokens);

}  // namespace pbs::decode
