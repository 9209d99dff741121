#include "proto/wire/slice_reader.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "proto/wire/field_tags.h"

namespace pbs::wire {
namespace {

constexpr size_t kPartBytesMax = size_t{1} << 30;  // protobuf counts in int

std::vector<grpc::Slice> SlicesOf(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  if (buffer.Valid()) (void)buffer.Dump(&slices);  // fails for compressed bytes: empty
  return slices;
}

}  // namespace

bool SliceStream::Next(const void** data, int* size) {
  while (slice_idx_ < slices_.size() && offset_ == slices_[slice_idx_].size()) {
    ++slice_idx_;
    offset_ = 0;
  }
  if (slice_idx_ == slices_.size()) return false;
  const grpc::Slice& slice = slices_[slice_idx_];
  const size_t part = std::min(slice.size() - offset_, kPartBytesMax);
  *data = slice.begin() + offset_;
  *size = static_cast<int>(part);
  offset_ += part;
  byte_count_ += static_cast<int64_t>(part);
  return true;
}

void SliceStream::BackUp(int count) {
  offset_ -= static_cast<size_t>(count);
  byte_count_ -= count;
}

bool SliceStream::Skip(int count) {
  const void* data;
  int size;
  while (count > 0 && Next(&data, &size)) {
    if (size > count) BackUp(size - count);
    count -= std::min(size, count);
  }
  return count == 0;
}

grpc::Slice SliceStream::Part(const void* data, size_t size) const {
  const grpc::Slice& slice = slices_[slice_idx_];
  const auto begin =
      static_cast<size_t>(static_cast<const uint8_t*>(data) - slice.begin());
  return slice.sub(begin, begin + size);
}

// The limit over the whole message makes BytesUntilLimit() answer everywhere.
SliceReader::SliceReader(const grpc::ByteBuffer& buffer)
    : stream_(SlicesOf(buffer)), coded_(&stream_) {
  coded_.PushLimit(static_cast<int>(buffer.Length()));
}

bool SliceReader::ReadNestedMessage(google::protobuf::MessageLite* message) {
  return Nested([&] {
    return message->MergePartialFromCodedStream(&coded_) &&
           coded_.ConsumedEntireMessage() && coded_.BytesUntilLimit() == 0;
  });
}

bool SliceReader::ReadInt32(int32_t* value) {
  uint64_t wide;  // negative numbers travel as ten bytes
  if (!coded_.ReadVarint64(&wide)) return false;
  *value = static_cast<int32_t>(wide);
  return true;
}

bool SliceReader::ReadPayload(Payload* payload) {
  uint32_t length;
  if (!ReadLength(&length)) return false;
  payload->Clear();
  while (length > 0) {
    const void* data;
    int size;
    if (!coded_.GetDirectBufferPointer(&data, &size)) return false;
    const uint32_t part = std::min(length, static_cast<uint32_t>(size));
    payload->Append(stream_.Part(data, part));
    coded_.Skip(static_cast<int>(part));
    length -= part;
  }
  return true;
}

bool SliceReader::ReadLength(uint32_t* length) {
  uint64_t wide;
  if (!coded_.ReadVarint64(&wide)) return false;
  if (wide > static_cast<uint64_t>(std::max(coded_.BytesUntilLimit(), 0))) return false;
  *length = static_cast<uint32_t>(wide);
  return true;
}

bool SliceReader::SkipField(uint32_t tag, int depth_left) {
  uint32_t length;
  uint64_t number;
  if (tag >> 3 == 0) return false;
  switch (tag & 7) {
    case kVarint:
      return coded_.ReadVarint64(&number);
    case kFixed64:
      return coded_.Skip(8);
    case kLength:
      return ReadLength(&length) && coded_.Skip(static_cast<int>(length));
    case kFixed32:
      return coded_.Skip(4);
    case kStartGroup:
      break;
    default:
      return false;
  }
  if (depth_left == 0) return false;
  const uint32_t end_tag = Tag(tag >> 3, kEndGroup);
  while (const uint32_t inner = coded_.ReadTag()) {
    if (inner == end_tag) return true;
    if (!SkipField(inner, depth_left - 1)) return false;
  }
  return false;
}

}  // namespace pbs::wire
