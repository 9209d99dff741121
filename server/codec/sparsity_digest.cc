#include "server/codec/sparsity_digest.h"
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/strings/str_format.h"
#include "server/codec/sha256.h"

namespace pbs::server {
namespace {

constexpr size_t kDigestHexDigits = 32;

// When every candidate is selected, forced blocks and the order of the keys change
// nothing: that is dense attention.
bool IsExact(const AttentionOptions& options, int32_t num_tokens,
             bool has_head_thresholds) {
  if (RunsDense(options, num_tokens)) return true;
  return !has_head_thresholds && SelectsEveryBlock(options);
}

std::string Named(const char* name, std::string_view canonical,
                  std::string_view tenant_salt,
                  std::string_view thresholds_digest = {}) {
  Sha256 hash;
  hash.AddField(canonical);
  hash.AddField(tenant_salt);
  if (!thresholds_digest.empty()) hash.AddField(thresholds_digest);
  return absl::StrFormat("%s-%s", name, hash.Finish().substr(0, kDigestHexDigits));
}

}  // namespace

std::string SparsityDigest(const AttentionOptions& options, int32_t num_tokens,
                           std::string_view tenant_salt,
                           std::string_view thresholds_digest) {
  const bool is_exact = IsExact(options, num_tokens, !thresholds_digest.empty());
  if (is_exact && tenant_salt.empty()) return kExactDigest;
  if (is_exact) return Named(kExactDigest, kExactDigest, tenant_salt);
  return Named(MethodName(options.method), CanonicalText(options), tenant_salt,
               thresholds_digest);
}

}  // namespace pbs::server
