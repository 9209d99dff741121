#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include <google/protobuf/io/coded_stream.h>
#include <grpcpp/support/proto_buffer_writer.h>

#include "proto/wire/crc32c.h"
#include "proto/wire/field_tags.h"
#include "proto/wire/messages.h"

namespace pbs::wire {
namespace {

using google::protobuf::io::CodedOutputStream;

// Collects the fields in front of a payload. The longest is KvChunk: 15 fields of at
// most 11 bytes, inside at most 6 bytes of a oneof member's tag and length.
class FieldWriter {
 public:
  void Int(uint32_t field, int64_t value) {
    if (value == 0) return;  // proto3: a field without presence is absent at 0
    Varint(field, static_cast<uint64_t>(value));
  }
  void Unsigned(uint32_t field, uint64_t value) {
    if (value != 0) Varint(field, value);
  }
  void Fixed64(uint32_t field, uint64_t value) {
    if (value == 0) return;
    end_ = CodedOutputStream::WriteTagToArray(Tag(field, kFixed64), end_);
    end_ = CodedOutputStream::WriteLittleEndian64ToArray(value, end_);
  }
  void Optional32(uint32_t field, const std::optional<uint32_t>& value) {
    if (!value.has_value()) return;
    end_ = CodedOutputStream::WriteTagToArray(Tag(field, kFixed32), end_);
    end_ = CodedOutputStream::WriteLittleEndian32ToArray(*value, end_);
  }
  // Tag and length; the payload itself follows the written fields.
  void PayloadPrefix(uint32_t field, size_t payload_bytes) {
    if (payload_bytes == 0) return;
    end_ = CodedOutputStream::WriteTagToArray(Tag(field, kLength), end_);
    end_ = CodedOutputStream::WriteVarint64ToArray(payload_bytes, end_);
  }

  // The same for a field whose bytes come before what is written after this.
  void Insert(uint32_t field, const Payload& inserted) {
    PayloadPrefix(field, inserted.size());
    inserted_ = inserted;
    insertion_ = end_;
  }

  // Makes fields and payload a member `field` of an enclosing message.
  void Enclose(uint32_t field, size_t payload_bytes) {
    std::array<uint8_t, kEnclosureBytes> prefix;
    const size_t length =
        static_cast<size_t>(end_ - begin_) + inserted_.size() + payload_bytes;
    uint8_t* prefix_end =
        CodedOutputStream::WriteTagToArray(Tag(field, kLength), prefix.data());
    prefix_end = CodedOutputStream::WriteVarint64ToArray(length, prefix_end);
    const auto prefix_bytes = prefix_end - prefix.data();
    begin_ -= prefix_bytes;
    std::memcpy(begin_, prefix.data(), static_cast<size_t>(prefix_bytes));
  }

  grpc::ByteBuffer Finish(const Payload& payload) const {
    std::vector<grpc::Slice> slices;
    slices.reserve(2 + inserted_.pieces().size() + payload.pieces().size());
    const uint8_t* begin = begin_;
    if (inserted_.size() > 0) {
      slices.emplace_back(begin, static_cast<size_t>(insertion_ - begin));
      slices.insert(slices.end(), inserted_.pieces().begin(), inserted_.pieces().end());
      begin = insertion_;
    }
    slices.emplace_back(begin, static_cast<size_t>(end_ - begin));
    slices.insert(slices.end(), payload.pieces().begin(), payload.pieces().end());
    return {slices.data(), slices.size()};
  }

 private:
  static constexpr size_t kEnclosureBytes = 11;
  static constexpr size_t kFieldsBytes = 15 * 11;

  void Varint(uint32_t field, uint64_t value) {
    end_ = CodedOutputStream::WriteTagToArray(Tag(field, kVarint), end_);
    end_ = CodedOutputStream::WriteVarint64ToArray(value, end_);
  }

  std::array<uint8_t, kEnclosureBytes + kFieldsBytes> buffer_;
  uint8_t* begin_ = buffer_.data() + kEnclosureBytes;
  uint8_t* end_ = begin_;
  Payload inserted_;
  const uint8_t* insertion_ = nullptr;
};

void WriteFields(const KvChunk& chunk, FieldWriter& fields) {
  fields.Fixed64(KvChunkField::kTicketEpoch, chunk.ticket_epoch);
  fields.Int(KvChunkField::kLayer, chunk.layer);
  fields.Int(KvChunkField::kKind, chunk.kind);
  fields.Int(KvChunkField::kTokenBegin, chunk.token_begin);
  fields.Int(KvChunkField::kTokenCount, chunk.token_count);
  fields.Int(KvChunkField::kHeadBegin, chunk.head_begin);
  fields.Int(KvChunkField::kHeadCount, chunk.head_count);
  fields.Int(KvChunkField::kDType, chunk.dtype);
  fields.Int(KvChunkField::kLayout, chunk.layout);
  fields.Unsigned(KvChunkField::kByteOffset, chunk.byte_offset);
  fields.Optional32(KvChunkField::kCrc32c, chunk.crc32c);
  fields.Optional32(KvChunkField::kLayerDigest, chunk.layer_digest);
  fields.Insert(KvChunkField::kScales, chunk.scales);
  fields.Unsigned(KvChunkField::kRegionOffset, chunk.region_offset);
  fields.PayloadPrefix(KvChunkField::kPayload, chunk.payload.size());
}

void WriteFields(const TensorChunk& chunk, FieldWriter& fields) {
  fields.Int(TensorChunkField::kTensor, chunk.tensor);
  fields.Unsigned(TensorChunkField::kOffset, chunk.offset);
  fields.PayloadPrefix(TensorChunkField::kData, chunk.data.size());
}

grpc::ByteBuffer EncodeTensorChunk(const TensorChunk& chunk, uint32_t member) {
  FieldWriter fields;
  WriteFields(chunk, fields);
  fields.Enclose(member, chunk.data.size());
  return fields.Finish(chunk.data);
}

}  // namespace

uint32_t Crc32cOf(const KvChunk& chunk) {
  uint32_t crc = 0;
  for (const Payload* part : {&chunk.scales, &chunk.payload}) {
    for (const grpc::Slice& piece : part->pieces()) {
      crc = ExtendCrc32c(crc, BytesOf(piece));
    }
  }
  return crc;
}

grpc::ByteBuffer EncodeKvChunk(const KvChunk& chunk) {
  FieldWriter fields;
  WriteFields(chunk, fields);
  return fields.Finish(chunk.payload);
}

grpc::ByteBuffer EncodeKvEvent(const KvChunk& chunk) {
  FieldWriter fields;
  WriteFields(chunk, fields);
  fields.Enclose(PrefillEventField::kKv, chunk.payload.size());
  return fields.Finish(chunk.payload);
}

grpc::ByteBuffer EncodeRequestChunk(const TensorChunk& chunk) {
  return EncodeTensorChunk(chunk, AttendRequestField::kChunk);
}

grpc::ByteBuffer EncodeResponseChunk(const TensorChunk& chunk) {
  return EncodeTensorChunk(chunk, AttendResponseField::kChunk);
}

grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message) {
  grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return {&slice, 1};
}

}  // namespace pbs::wire
