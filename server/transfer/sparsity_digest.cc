#include "server/transfer/sparsity_digest.h"
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/strings/str_format.h"
#include "server/transfer/sha256.h"

namespace pbs::server {
namespace {

constexpr size_t kDigestHexDigits = 32;

// threshold >= 1 selects every candidate: with the first block forced or not, and in
// any order of the keys, that is dense attention.
bool IsExact(const AttentionOptions& options, int32_t num_tokens) {
  if (options.method == Method::kDense || options.threshold >= 1.0f) return true;
  return options.method == Method::kPbs && num_tokens <= options.segment_size;
}

std::string Named(const char* name, std::string_view canonical,
                  std::string_view tenant_salt) {
  Sha256 hash;
  hash.AddField(canonical);
  hash.AddField(tenant_salt);
  return absl::StrFormat("%s-%s", name, hash.Finish().substr(0, kDigestHexDigits));
}

}  // namespace

std::string SparsityDigest(const AttentionOptions& options, int32_t num_tokens,
                           std::string_view tenant_salt) {
  const bool is_exact = IsExact(options, num_tokens);
  if (is_exact && tenant_salt.empty()) return kExactDigest;
  if (is_exact) return Named(kExactDigest, kExactDigest, tenant_salt);
  std::string canonical = absl::StrFormat(
      "%s block_size=%d threshold=%.9g force_first_block=%d dense_fallback=%d",
      MethodName(options.method), options.block_size, options.threshold,
      options.force_first_block, options.dense_fallback);
  if (options.method == Method::kPbs) {
    canonical += absl::StrFormat(" segment_size=%d scope=%s", options.segment_size,
                                 ScopeName(options.scope));
  }
  return Named(MethodName(options.method), canonical, tenant_salt);
}

}  // namespace pbs::server
