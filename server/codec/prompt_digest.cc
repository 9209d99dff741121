#include "server/codec/prompt_digest.h"

#include <bit>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "server/codec/sha256.h"

namespace pbs::server {

static_assert(std::endian::native == std::endian::little, "ids are hashed as they lie");

std::string PromptDigest(std::span<const int32_t> tokens) {
  const auto bytes = std::as_bytes(tokens);
  Sha256 sha;
  sha.Add(std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  return "sha256:" + sha.Finish();
}

}  // namespace pbs::server
