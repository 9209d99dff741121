// The name of a cache's approximation, so that an approximate cache is never taken for
// an exact one, nor one tenant's for another's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "pbs/attention.h"

namespace pbs::server {

inline constexpr char kExactDigest[] = "exact";

// "exact" when the options make a prompt of `num_tokens` run dense whatever it says;
// else the method's name and 32 hex digits over everything that decides the result and
// the salt: "pbs-5d41402abc4b2a76b9719d911017c592". With a salt an exact cache has the
// digits, too: "exact-...". Equal inputs give equal digests in every build.
std::string SparsityDigest(const AttentionOptions& options, int32_t num_tokens,
                           std::string_view tenant_salt);

}  // namespace pbs::server
