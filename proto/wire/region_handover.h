// The records with which a process asks a server, over its Unix socket, for the shared
// memory of a cache.
//
// A connection has one request and one reply. With an OK reply comes one descriptor
// (SCM_RIGHTS). Numbers are little-endian.
//
//   request  u32 magic "PBSR", u32 version, 32 bytes handle, u64 epoch      48 bytes
//   reply    u32 magic "PBSR", u32 version, u32 gRPC status code, u32 0,
//            u64 bytes of the memory                                        24 bytes
//
// Threading: stateless functions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace pbs::wire {

inline constexpr size_t kHandleBytes = 32;
inline constexpr size_t kRegionRequestBytes = 48;
inline constexpr size_t kRegionReplyBytes = 24;
inline constexpr uint32_t kStatusCodeMax = 16;  // of gRPC

// KvTicket.handle and KvTicket.epoch
struct RegionRequest {
  std::string handle;
  uint64_t epoch = 0;
};

struct RegionReply {
  uint32_t code = 0;   // of gRPC; 0 is OK
  uint64_t bytes = 0;  // with OK
};

// nullopt when the handle does not have 32 bytes.
std::optional<std::array<std::byte, kRegionRequestBytes>> EncodeRegionRequest(
    const RegionRequest& request);
std::array<std::byte, kRegionReplyBytes> EncodeRegionReply(const RegionReply& reply);

// nullopt when the record has another length, magic or version, when a handle has
// anything but hex digits, or when a code is no status code.
std::optional<RegionRequest> DecodeRegionRequest(std::span<const std::byte> record);
std::optional<RegionReply> DecodeRegionReply(std::span<const std::byte> record);

}  // namespace pbs::wire
