// CRC-32C (Castagnoli) of chunks and layers: the checksum of every KV transfer.
//
// Written here because no library with a dispatched CRC-32C is in the distributions we
// build on. x86-64 with SSE 4.2 runs three hardware streams (about 8 bytes a cycle);
// any other CPU reads eight bytes a step from tables.
//
// Threading: stateless functions; a LayerDigest belongs to one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pbs::wire {

// The CRC of everything behind `crc`, continued by `bytes`; start with 0.
uint32_t ExtendCrc32c(uint32_t crc, std::span<const std::byte> bytes);

inline uint32_t Crc32c(std::span<const std::byte> bytes) {
  return ExtendCrc32c(0, bytes);
}

// The same by tables, whatever the CPU has. For tests.
uint32_t ExtendCrc32cPortable(uint32_t crc, std::span<const std::byte> bytes);

// KvChunk.layer_digest: CRC-32C over the crc32c fields of a layer's chunks, in order,
// each as 4 little-endian bytes. A missing, doubled or swapped chunk changes it.
class LayerDigest {
 public:
  void Add(uint32_t chunk_crc);
  uint32_t value() const { return crc_; }

 private:
  uint32_t crc_ = 0;
};

}  // namespace pbs::wire
