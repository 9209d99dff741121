// KvDescriptor.prompt_digest: which prompt a cache is of.
//
// Threading: stateless.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace pbs::server {

// "sha256:" and 64 hex digits over the ids, each as 4 little-endian bytes.
std::string PromptDigest(std::span<const int32_t> tokens);

}  // namespace pbs::server
