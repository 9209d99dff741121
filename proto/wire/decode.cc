#include <climits>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "proto/wire/field_tags.h"
#include "proto/wire/messages.h"
#include "proto/wire/slice_reader.h"

namespace pbs::wire {
namespace {

// The member M of a oneof: the one that is there, to be merged into, or a new one.
template <class M, class Oneof>
M& Member(Oneof* oneof) {
  if (M* present = std::get_if<M>(oneof)) return *present;
  return oneof->template emplace<M>();
}

template <class Enum>
bool ReadEnum(SliceReader& in, Enum* value) {
  int32_t number;
  if (!in.ReadInt32(&number)) return false;
  *value = static_cast<Enum>(number);
  return true;
}

bool ReadField(SliceReader& in, uint32_t tag, KvChunk* out) {
  using F = KvChunkField;
  switch (tag) {
    case Tag(F::kTicketEpoch, kFixed64):
      return in.ReadFixed64(&out->ticket_epoch);
    case Tag(F::kLayer, kVarint):
      return in.ReadInt32(&out->layer);
    case Tag(F::kKind, kVarint):
      return ReadEnum(in, &out->kind);
    case Tag(F::kTokenBegin, kVarint):
      return in.ReadInt32(&out->token_begin);
    case Tag(F::kTokenCount, kVarint):
      return in.ReadInt32(&out->token_count);
    case Tag(F::kHeadBegin, kVarint):
      return in.ReadInt32(&out->head_begin);
    case Tag(F::kHeadCount, kVarint):
      return in.ReadInt32(&out->head_count);
    case Tag(F::kDType, kVarint):
      return ReadEnum(in, &out->dtype);
    case Tag(F::kLayout, kVarint):
      return ReadEnum(in, &out->layout);
    case Tag(F::kByteOffset, kVarint):
      return in.ReadUint64(&out->byte_offset);
    case Tag(F::kCrc32c, kFixed32):
      return in.ReadFixed32(&out->crc32c.emplace());
    case Tag(F::kLayerDigest, kFixed32):
      return in.ReadFixed32(&out->layer_digest.emplace());
    case Tag(F::kScales, kLength):
      return in.ReadPayload(&out->scales);
    case Tag(F::kRegionOffset, kVarint):
      return in.ReadUint64(&out->region_offset);
    case Tag(F::kPayload, kLength):
      return in.ReadPayload(&out->payload);
    default:
      return in.SkipField(tag);
  }
}

bool ReadField(SliceReader& in, uint32_t tag, TensorChunk* out) {
  using F = TensorChunkField;
  switch (tag) {
    case Tag(F::kTensor, kVarint):
      return ReadEnum(in, &out->tensor);
    case Tag(F::kOffset, kVarint):
      return in.ReadUint64(&out->offset);
    case Tag(F::kData, kLength):
      return in.ReadPayload(&out->data);
    default:
      return in.SkipField(tag);
  }
}

template <class Chunk>
bool ReadNestedChunk(SliceReader& in, Chunk* out) {
  return in.ReadNested([&](uint32_t tag) { return ReadField(in, tag, out); });
}

// Runs `read(in, tag)` over a whole message named `name`.
template <class ReadOne>
grpc::Status Decode(const char* name, const grpc::ByteBuffer& buffer, ReadOne&& read) {
  const size_t bytes = buffer.Length();
  if (bytes > INT_MAX) {
    return {grpc::StatusCode::INVALID_ARGUMENT,
            std::string(name) + " has " + std::to_string(bytes) + " bytes, more than " +
                std::to_string(INT_MAX)};
  }
  SliceReader in(buffer);
  if (in.ReadMessage([&](uint32_t tag) { return read(in, tag); })) {
    return grpc::Status::OK;
  }
  return {grpc::StatusCode::INVALID_ARGUMENT,
          std::string("malformed ") + name + " at byte " +
              std::to_string(in.position()) + " of " + std::to_string(bytes)};
}

}  // namespace

grpc::Status DecodeKvChunk(const grpc::ByteBuffer& buffer, KvChunk* out) {
  *out = {};
  return Decode("KvChunk", buffer,
                [&](SliceReader& in, uint32_t tag) { return ReadField(in, tag, out); });
}

grpc::Status DecodeAttendRequest(const grpc::ByteBuffer& buffer, AttendRequest* out) {
  using F = AttendRequestField;
  *out = {};
  return Decode("AttendRequest", buffer, [&](SliceReader& in, uint32_t tag) {
    switch (tag) {
      case Tag(F::kHeader, kLength):
        return in.ReadNestedMessage(&Member<v1::AttendHeader>(out));
      case Tag(F::kChunk, kLength):
        return ReadNestedChunk(in, &Member<TensorChunk>(out));
      default:
        return in.SkipField(tag);
    }
  });
}

grpc::Status DecodeAttendResponse(const grpc::ByteBuffer& buffer, AttendResponse* out) {
  using F = AttendResponseField;
  *out = {};
  return Decode("AttendResponse", buffer, [&](SliceReader& in, uint32_t tag) {
    switch (tag) {
      case Tag(F::kHeader, kLength):
        return in.ReadNestedMessage(&Member<v1::AttendResponseHeader>(out));
      case Tag(F::kChunk, kLength):
        return ReadNestedChunk(in, &Member<TensorChunk>(out));
      case Tag(F::kStats, kLength):
        return in.ReadNestedMessage(&Member<v1::AttendStats>(out));
      default:
        return in.SkipField(tag);
    }
  });
}

grpc::Status DecodePrefillEvent(const grpc::ByteBuffer& buffer, PrefillEvent* out) {
  using F = PrefillEventField;
  *out = {};
  return Decode("PrefillEvent", buffer, [&](SliceReader& in, uint32_t tag) {
    switch (tag) {
      case Tag(F::kAdmitted, kLength):
        return in.ReadNestedMessage(&Member<v1::Admitted>(out));
      case Tag(F::kLayer, kLength):
        return in.ReadNestedMessage(&Member<v1::LayerDone>(out));
      case Tag(F::kKv, kLength):
        return ReadNestedChunk(in, &Member<KvChunk>(out));
      case Tag(F::kDone, kLength):
        return in.ReadNestedMessage(&Member<v1::Done>(out));
      default:
        return in.SkipField(tag);
    }
  });
}

grpc::Status DecodeMessage(const grpc::ByteBuffer& buffer,
                           google::protobuf::MessageLite* out) {
  std::vector<grpc::Slice> slices;
  if (buffer.Valid()) (void)buffer.Dump(&slices);
  SliceStream stream(std::move(slices));
  if (out->ParseFromZeroCopyStream(&stream)) return grpc::Status::OK;
  return {grpc::StatusCode::INVALID_ARGUMENT,
          "malformed " + out->GetTypeName() + " of " + std::to_string(buffer.Length()) +
              " bytes"};
}

}  // namespace pbs::wire
