// Field numbers of the messages that the codec writes and reads itself. A unit test
// compares its output with protobuf's, so a wrong number fails the test.
#pragma once

#include <cstdint>

namespace pbs::wire {

enum WireType : uint32_t {
  kVarint = 0,
  kFixed64 = 1,
  kLength = 2,
  kStartGroup = 3,
  kEndGroup = 4,
  kFixed32 = 5,
};

constexpr uint32_t Tag(uint32_t field, WireType type) { return field << 3 | type; }

struct KvChunkField {
  enum : uint32_t {
    kTicketEpoch = 1,
    kLayer = 2,
    kKind = 3,
    kTokenBegin = 4,
    kTokenCount = 5,
    kHeadBegin = 6,
    kHeadCount = 7,
    kDType = 8,
    kLayout = 9,
    kByteOffset = 10,
    kCrc32c = 11,
    kLayerDigest = 12,
    kScales = 13,
    kRegionOffset = 14,
    kPayload = 15,
  };
};
struct TensorChunkField {
  enum : uint32_t { kTensor = 1, kOffset = 2, kData = 15 };
};
struct AttendRequestField {
  enum : uint32_t { kHeader = 1, kChunk = 2 };
};
struct AttendResponseField {
  enum : uint32_t { kHeader = 1, kChunk = 2, kStats = 3 };
};
struct PrefillEventField {
  enum : uint32_t { kAdmitted = 1, kLayer = 2, kKv = 3, kDone = 4 };
};

}  // namespace pbs::wire
