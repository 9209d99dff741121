// The digest of the approximation in a cache. It distinguishes an approximate cache
// from an exact one, and one tenant's cache from another's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "pbs/attention.h"

namespace pbs::server {

inline constexpr char kExactDigest[] = "exact";

// "exact" when the options make every prompt of `num_tokens` tokens run dense. Else the
// method's name and 32 hex digits over the salt and all options that decide the result:
// "pbs-5d41402abc4b2a76b9719d911017c592". With a salt an exact cache also has digits:
// "exact-...". `thresholds_digest` stands for thresholds of the query heads
// (Profile::thresholds_digest); they decide instead of options.threshold unless it is
// empty. Equal inputs give equal digests in every build.
std::string SparsityDigest(const AttentionOptions& options, int32_t num_tokens,
                           std::string_view tenant_salt,
                           std::string_view thresholds_digest = {});

}  // namespace pbs::server
