// The files that pbs-decode reads and writes.
//
// Threading: stateless. Errors name the file and its defect.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pbs/v1/kv.pb.h"

namespace pbs::decode {

// A JSON list of at least one token id in [0, vocab_size).
absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& path,
                                                int32_t vocab_size);

// A JSON object of handle, epoch (decimal, as a string), model_digest, sparsity_digest.
absl::StatusOr<v1::KvTicket> ReadTicket(const std::string& path);

// Writes `text`. After an error the file may be incomplete.
absl::Status WriteText(const std::string& path, const std::string& text);

}  // namespace pbs::decode
