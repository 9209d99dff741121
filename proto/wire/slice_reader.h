// Reads protobuf's wire format from the slices of one received message, with bounds
// checks.
//
// Threading: one thread. Memory: keeps references to the slices; payloads read from it
// share them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream.h>
#include <google/protobuf/message_lite.h>
#include <grpcpp/support/byte_buffer.h>

#include "proto/wire/payload.h"

namespace pbs::wire {

// The slices as protobuf's input stream. Part() gives the slice of a returned range.
class SliceStream final : public google::protobuf::io::ZeroCopyInputStream {
 public:
  explicit SliceStream(std::vector<grpc::Slice> slices) : slices_(std::move(slices)) {}

  bool Next(const void** data, int* size) override;
  void BackUp(int count) override;
  bool Skip(int count) override;
  int64_t ByteCount() const override { return byte_count_; }

  // The part [data, data + size) of the slice that the last Next() returned.
  grpc::Slice Part(const void* data, size_t size) const;

 private:
  std::vector<grpc::Slice> slices_;
  size_t slice_idx_ = 0;  // index of the slice that Next() reads from
  size_t offset_ = 0;     // bytes of it that Next() has returned
  int64_t byte_count_ = 0;
};

// Reads fields one by one. Every Read method returns false on malformed or missing
// bytes; the reader then stays at that position.
class SliceReader {
 public:
  // Requires Length() <= INT32_MAX.
  explicit SliceReader(const grpc::ByteBuffer& buffer);

  // Calls `read(tag)` for every field until the end of the message. `read` returns
  // false to fail; for an unknown field it returns SkipField(tag).
  template <class ReadField>
  bool ReadMessage(ReadField&& read) {
    while (const uint32_t tag = coded_.ReadTag()) {
      if (!read(tag)) return false;
    }
    return coded_.ConsumedEntireMessage() && coded_.BytesUntilLimit() == 0;
  }
  // Reads a length and then, through `read`, the fields in that many bytes.
  template <class ReadField>
  bool ReadNested(ReadField&& read) {
    return Nested([&] { return ReadMessage(read); });
  }
  // Reads a length and then fields of `message`, which are merged into it.
  bool ReadNestedMessage(google::protobuf::MessageLite* message);

  bool ReadInt32(int32_t* value);
  bool ReadUint64(uint64_t* value) { return coded_.ReadVarint64(value); }
  bool ReadFixed32(uint32_t* value) { return coded_.ReadLittleEndian32(value); }
  bool ReadFixed64(uint64_t* value) { return coded_.ReadLittleEndian64(value); }
  // Reads a length and refers to that many bytes; replaces the contents of `payload`.
  bool ReadPayload(Payload* payload);
  bool SkipField(uint32_t tag) { return SkipField(tag, kGroupDepthMax); }

  int64_t position() const { return coded_.CurrentPosition(); }

 private:
  static constexpr int kGroupDepthMax = 64;

  template <class ReadBody>
  bool Nested(ReadBody&& read_body) {
    uint32_t length;
    if (!ReadLength(&length)) return false;
    const auto outer = coded_.PushLimit(static_cast<int>(length));
    if (!read_body()) return false;
    coded_.PopLimit(outer);
    return true;
  }
  // Reads a length; false unless the enclosing message has that many bytes left.
  bool ReadLength(uint32_t* length);
  bool SkipField(uint32_t tag, int depth_left);

  SliceStream stream_;
  google::protobuf::io::CodedInputStream coded_;
};

}  // namespace pbs::wire
