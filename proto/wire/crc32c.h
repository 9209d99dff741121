// CRC-32C (Castagnoli) of chunks and layers: the checksum of every KV transfer.
//
// It is implemented here because the supported distributions have no library whose
// CRC-32C chooses the instruction set at run time. In the caches, carry-less products
// of AVX-512 are the fastest way, before three streams of SSE 4.2's instruction. Other
// CPUs use tables, eight bytes per step.
//
// Threading: stateless functions; a LayerDigest belongs to one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pbs::wire {

// Extends `crc`, the CRC of earlier bytes (0 for none), by `bytes`.
uint32_t ExtendCrc32c(uint32_t crc, std::span<const std::byte> bytes);

inline uint32_t Crc32c(std::span<const std::byte> bytes) {
  return ExtendCrc32c(0, bytes);
}

// Copies bytes that another process may change meanwhile, and extends `crc` by what was
// written to `target`. Each source byte is read once. With `streamed` the copy goes
// past the caches (stream_copy.h).
uint32_t CopyCrc32c(uint32_t crc, std::byte* target, std::span<const std::byte> source,
                    bool streamed);

// How the CPU computes it; ExtendCrc32c() takes the last one that Runs().
enum class CrcWay : uint8_t { kTables, kInstruction, kProducts };
bool Runs(CrcWay way);
// The same in one way, which Runs(). For tests.
uint32_t ExtendCrc32cBy(CrcWay way, uint32_t crc, std::span<const std::byte> bytes);
uint32_t CopyCrc32cBy(CrcWay way, uint32_t crc, std::byte* target,
                      std::span<const std::byte> source, bool streamed);

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
