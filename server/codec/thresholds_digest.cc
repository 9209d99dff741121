#include "server/codec/thresholds_digest.h"

#include <algorithm>
#include <bit>

#include "server/codec/sha256.h"

namespace pbs::server {

static_assert(std::endian::native == std::endian::little,
              "thresholds are hashed as they lie");

bool AreEqual(std::span<const float> thresholds) {
  return !thresholds.empty() &&
         std::all_of(thresholds.begin(), thresholds.end(),
                     [&](float x) { return x == thresholds.front(); });
}

std::string ThresholdsDigest(std::span<const float> thresholds) {
  Sha256 hash;
  hash.AddField(
      {reinterpret_cast<const char*>(thresholds.data()), thresholds.size_bytes()});
  return hash.Finish();
}

}  // namespace pbs::server
