// The slice codec: encodes and decodes messages with tensor bytes without copying those
// bytes.
//
// The codec writes a chunk's small fields in protobuf's wire format and attaches the
// payload as a slice, so that any protobuf peer can read it. It reads everything that a
// protobuf peer may send: fields in any order, unknown fields, a payload that is not
// last, a repeated oneof (the last wins, equal members merge).
//
// Threading: stateless functions. Memory: Encode keeps references to the payload's
// slices until gRPC has sent them; Decode's payloads refer to the received slices.
// Errors: INVALID_ARGUMENT names the message and its defect.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include "pbs/v1/attention.pb.h"
#include "pbs/v1/kv.pb.h"
#include "pbs/v1/prefill.pb.h"
#include "proto/wire/payload.h"

namespace pbs::wire {

// v1::KvChunk. Enums are open, as in protobuf: check them before use.
struct KvChunk {
  uint64_t ticket_epoch = 0;
  int32_t layer = 0;
  v1::KvChunk::Kind kind = v1::KvChunk::KIND_UNSPECIFIED;
  int32_t token_begin = 0;
  int32_t token_count = 0;
  int32_t head_begin = 0;
  int32_t head_count = 0;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  v1::KvLayout layout = v1::KV_LAYOUT_UNSPECIFIED;
  uint64_t byte_offset = 0;
  std::optional<uint32_t> crc32c;
  std::optional<uint32_t> layer_digest;
  // f32 little-endian [head_count, pages]; only with F8_E4M3
  Payload scales;
  uint64_t region_offset = 0;
  Payload payload;
};

// KvChunk.crc32c of a chunk with these scales and this payload.
uint32_t Crc32cOf(const KvChunk& chunk);

// v1::TensorChunk.
struct TensorChunk {
  v1::TensorName tensor = v1::TENSOR_NAME_UNSPECIFIED;
  uint64_t offset = 0;
  Payload data;
};

// monostate: no member of the oneof was set.
using AttendRequest = std::variant<std::monostate, v1::AttendHeader, TensorChunk>;
using AttendResponse = std::variant<std::monostate, v1::AttendResponseHeader,
                                    TensorChunk, v1::AttendStats>;
using PrefillEvent =
    std::variant<std::monostate, v1::Admitted, v1::LayerDone, KvChunk, v1::Done>;

grpc::ByteBuffer EncodeKvChunk(const KvChunk& chunk);
grpc::ByteBuffer EncodeKvEvent(const KvChunk& chunk);            // PrefillEvent.kv
grpc::ByteBuffer EncodeRequestChunk(const TensorChunk& chunk);   // AttendRequest.chunk
grpc::ByteBuffer EncodeResponseChunk(const TensorChunk& chunk);  // AttendResponse.chunk

// After an error `out` holds the fields read so far.
grpc::Status DecodeKvChunk(const grpc::ByteBuffer& buffer, KvChunk* out);
grpc::Status DecodeAttendRequest(const grpc::ByteBuffer& buffer, AttendRequest* out);
grpc::Status DecodeAttendResponse(const grpc::ByteBuffer& buffer, AttendResponse* out);
grpc::Status DecodePrefillEvent(const grpc::ByteBuffer& buffer, PrefillEvent* out);

// Messages without tensor bytes, for the same raw methods.
grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message);
grpc::Status DecodeMessage(const grpc::ByteBuffer& buffer,
                           google::protobuf::MessageLite* out);

}  // namespace pbs::wire
