#include "proto/wire/region_handover.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

namespace pbs::wire {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr uint32_t kMagic = 0x52534250;  // "PBSR"
constexpr uint32_t kVersion = 1;
// Offsets in the records
constexpr size_t kVersionAt = 4;
constexpr size_t kHandleAt = 8;
constexpr size_t kEpochAt = kHandleAt + kHandleBytes;
constexpr size_t kCodeAt = 8;
constexpr size_t kZeroAt = 12;
constexpr size_t kSizeAt = 16;

template <class Number>
void Put(std::span<std::byte> record, size_t at, Number value) {
  std::memcpy(record.subspan(at, sizeof(value)).data(), &value, sizeof(value));
}

template <class Number>
Number Get(std::span<const std::byte> record, size_t at) {
  Number value;
  std::memcpy(&value, record.subspan(at, sizeof(value)).data(), sizeof(value));
  return value;
}

bool HasPrefix(std::span<const std::byte> record) {
  return Get<uint32_t>(record, 0) == kMagic &&
         Get<uint32_t>(record, kVersionAt) == kVersion;
}

bool IsHexDigit(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

}  // namespace

std::optional<std::array<std::byte, kRegionRequestBytes>> EncodeRegionRequest(
    const RegionRequest& request) {
  if (request.handle.size() != kHandleBytes) return std::nullopt;
  std::array<std::byte, kRegionRequestBytes> record;
  Put(record, 0, kMagic);
  Put(record, kVersionAt, kVersion);
  std::memcpy(record.data() + kHandleAt, request.handle.data(), kHandleBytes);
  Put(record, kEpochAt, request.epoch);
  return record;
}

std::array<std::byte, kRegionReplyBytes> EncodeRegionReply(const RegionReply& reply) {
  std::array<std::byte, kRegionReplyBytes> record;
  Put(record, 0, kMagic);
  Put(record, kVersionAt, kVersion);
  Put(record, kCodeAt, reply.code);
  Put(record, kZeroAt, uint32_t{0});
  Put(record, kSizeAt, reply.bytes);
  return record;
}

std::optional<RegionRequest> DecodeRegionRequest(std::span<const std::byte> record) {
  if (record.size() != kRegionRequestBytes || !HasPrefix(record)) return std::nullopt;
  RegionRequest request;
  request.handle.assign(reinterpret_cast<const char*>(record.data()) + kHandleAt,
                        kHandleBytes);
  if (!std::all_of(request.handle.begin(), request.handle.end(), IsHexDigit)) {
    return std::nullopt;
  }
  request.epoch = Get<uint64_t>(record, kEpochAt);
  return request;
}

std::optional<RegionReply> DecodeRegionReply(std::span<const std::byte> record) {
  if (record.size() != kRegionReplyBytes || !HasPrefix(record)) return std::nullopt;
  const RegionReply reply = {.code = Get<uint32_t>(record, kCodeAt),
                             .bytes = Get<uint64_t>(record, kSizeAt)};
  if (reply.code > kStatusCodeMax || Get<uint32_t>(record, kZeroAt) != 0) {
    return std::nullopt;
  }
  return reply;
}

}  // namespace pbs::wire
