// Spec: proto/wire/messages.h. The decoder agrees with protobuf about what is well
// formed and about every value, however the bytes are cut into slices.
//
// Input: one byte that says where to cut, one that picks the message, the message.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "proto/wire/messages.h"

namespace {

using pbs::wire::KvChunk;
using pbs::wire::TensorChunk;

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_wire_decode: %s\n", what);
  std::abort();
}

grpc::ByteBuffer Sliced(const uint8_t* data, size_t size, size_t part) {
  std::vector<grpc::Slice> slices;
  for (size_t begin = 0; begin < size; begin += part) {
    slices.emplace_back(data + begin, begin + part < size ? part : size - begin);
  }
  return {slices.data(), slices.size()};
}

std::string Flatten(const pbs::wire::Payload& payload) {
  std::string bytes(payload.size(), '\0');
  payload.CopyTo(reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

bool Same(const KvChunk& ours, const pbs::v1::KvChunk& theirs) {
  return ours.ticket_epoch == theirs.ticket_epoch() && ours.layer == theirs.layer() &&
         ours.kind == theirs.kind() && ours.token_begin == theirs.token_begin() &&
         ours.token_count == theirs.token_count() &&
         ours.head_begin == theirs.head_begin() &&
         ours.head_count == theirs.head_count() && ours.dtype == theirs.dtype() &&
         ours.layout == theirs.layout() && ours.byte_offset == theirs.byte_offset() &&
         ours.crc32c.has_value() == theirs.has_crc32c() &&
         ours.crc32c.value_or(0) == theirs.crc32c() &&
         ours.layer_digest.has_value() == theirs.has_layer_digest() &&
         ours.layer_digest.value_or(0) == theirs.layer_digest() &&
         Flatten(ours.scales) == theirs.scales() &&
         ours.region_offset == theirs.region_offset() &&
         Flatten(ours.payload) == theirs.payload();
}

bool Same(const TensorChunk& ours, const pbs::v1::TensorChunk& theirs) {
  return ours.tensor == theirs.tensor() && ours.offset == theirs.offset() &&
         Flatten(ours.data) == theirs.data();
}

// What protobuf accepts we accept. The other way round there are differences without
// harm (how long a tag's varint may be), so only agreement on values is asked for.
template <class Theirs, class Ours, class Decode, class Compare>
void Check(const uint8_t* data, size_t size, size_t part, Decode decode,
           Compare compare) {
  Theirs theirs;
  const bool they_accept = theirs.ParseFromArray(data, static_cast<int>(size));
  Ours ours;
  const bool we_accept = decode(Sliced(data, size, part), &ours).ok();
  Require(we_accept || !they_accept, "refuses what protobuf accepts");
  if (we_accept && they_accept) compare(ours, theirs);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const size_t part = data[0] % 64 + 1;
  const uint8_t which = data[1] % 4;
  data += 2;
  size -= 2;
  if (which == 0) {
    Check<pbs::v1::KvChunk, KvChunk>(
        data, size, part, pbs::wire::DecodeKvChunk,
        [](const auto& ours, const auto& theirs) {
          Require(Same(ours, theirs), "KvChunk differs");
          pbs::v1::KvChunk back;
          std::vector<grpc::Slice> slices;
          Require(pbs::wire::EncodeKvChunk(ours).Dump(&slices).ok(), "cannot encode");
          std::string bytes;
          for (const auto& slice : slices) bytes.append(slice.begin(), slice.end());
          Require(back.ParseFromString(bytes) && Same(ours, back),
                  "does not re-encode");
        });
  } else if (which == 1) {
    Check<pbs::v1::AttendRequest, pbs::wire::AttendRequest>(
        data, size, part, pbs::wire::DecodeAttendRequest,
        [](const auto& ours, const auto& theirs) {
          Require(ours.index() == static_cast<size_t>(theirs.message_case()),
                  "another member");
          if (const auto* chunk = std::get_if<TensorChunk>(&ours)) {
            Require(Same(*chunk, theirs.chunk()), "TensorChunk differs");
          }
        });
  } else if (which == 2) {
    Check<pbs::v1::AttendResponse, pbs::wire::AttendResponse>(
        data, size, part, pbs::wire::DecodeAttendResponse,
        [](const auto& ours, const auto& theirs) {
          Require(ours.index() == static_cast<size_t>(theirs.message_case()),
                  "another member");
        });
  } else {
    Check<pbs::v1::PrefillEvent, pbs::wire::PrefillEvent>(
        data, size, part, pbs::wire::DecodePrefillEvent,
        [](const auto& ours, const auto& theirs) {
          Require(ours.index() == static_cast<size_t>(theirs.event_case()),
                  "another member");
          if (const auto* chunk = std::get_if<KvChunk>(&ours)) {
            Require(Same(*chunk, theirs.kv()), "KvChunk differs");
          }
        });
  }
  return 0;
}
