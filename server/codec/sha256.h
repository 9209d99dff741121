// SHA-256 (FIPS 180-4) for digests and fingerprints of requests, which must not
// collide. Not for bulk data.
//
// Threading: one hasher per thread. Memory: 112 bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pbs::server {

class Sha256 {
 public:
  void Add(std::string_view bytes);
  // Adds the length and then the bytes, so that two fields never hash like one.
  void AddField(std::string_view bytes);
  // 64 lower-case hex digits. Call it once.
  std::string Finish();

 private:
  void AddBlock(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> pending_{};
  uint64_t total_bytes_ = 0;
};

}  // namespace pbs::server
