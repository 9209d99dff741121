#include "client/cpp/kv_receiver.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/wire/fp8_chunk.h"
#include "proto/wire/stream_copy.h"

namespace pbs::client {
namespace {

std::string Where(int32_t layer, v1::KvChunk::Kind kind, uint64_t offset) {
  const std::string name = v1::KvChunk::Kind_IsValid(kind)
                               ? v1::KvChunk::Kind_Name(kind)
                               : absl::StrCat(static_cast<int>(kind));
  return absl::StrCat("layer ", layer, " ", name, " offset ", offset);
}

int64_t ElementBytes(v1::DType dtype) {
  return dtype == v1::F32 ? 4 : dtype == v1::F8_E4M3 ? 1 : 2;
}

}  // namespace

int64_t KvExpectation::row_bytes() const { return head_dim * ElementBytes(dtype); }

int64_t KvExpectation::stored_bytes() const {
  if (dtype != v1::F8_E4M3) return array_bytes();
  return array_bytes() * ElementBytes(stored);
}

int64_t KvExpectation::array_bytes() const {
  return row_bytes() * token_count * head_count;
}

absl::Status KvReceiver::Add(const wire::KvChunk& chunk) {
  const bool begins = chunk.kind == v1::KvChunk::K && chunk.byte_offset == 0;
  if (resumed_ && begins && chunk.layer == layer_) Rewind();
  resumed_ = false;
  if (absl::Status place = CheckPlace(chunk); !place.ok()) return place;
  if (offset_ == 0 && !views()) {
    const int64_t bytes = expected_.stored_bytes();
    array_ = target_.Array(layer_, kind_, bytes);
    if (static_cast<int64_t>(array_.size()) != bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("no memory for ", bytes, " bytes of ", Where(layer_, kind_, 0)));
    }
  }
  const int64_t bytes =
      int64_t{chunk.token_count} * chunk.head_count * expected_.row_bytes();
  if (absl::Status stored = Store(chunk, bytes); !stored.ok()) return stored;
  offset_ += bytes;
  bytes_ += bytes;
  return offset_ == expected_.array_bytes() ? EndArray(chunk) : absl::OkStatus();
}

absl::Status KvReceiver::Store(const wire::KvChunk& chunk, int64_t bytes) {
  if (region_ != nullptr) return StoreFromRegion(chunk, bytes);
  if (expected_.dtype == v1::F8_E4M3) {
    if (expected_.checksums) {
      if (absl::Status sum = CompareSum(chunk, wire::Crc32cOf(chunk)); !sum.ok()) {
        return sum;
      }
    }
    wire::WidenFp8(chunk, expected_.page_tokens, expected_.head_dim, expected_.stored,
                   array_.data() + offset_ * ElementBytes(expected_.stored));
    return absl::OkStatus();
  }
  std::byte* const target = array_.data() + offset_;
  if (expected_.checksums) {
    return CompareSum(chunk, chunk.payload.CopyInto(target, array_.size(), 0));
  }
  chunk.payload.CopyInto(target, array_.size());
  return absl::OkStatus();
}

// What counts is what was copied: the server may take the memory away at any moment.
absl::Status KvReceiver::StoreFromRegion(const wire::KvChunk& chunk, int64_t bytes) {
  if (absl::Status place = CheckRegion(chunk, bytes); !place.ok()) return place;
  const auto source =
      region_->bytes.subspan(chunk.region_offset, static_cast<size_t>(bytes));
  if (views()) {
    if (expected_.checksums) {
      absl::Status sum = CompareSum(chunk, wire::Crc32c(source));
      if (!sum.ok()) return sum;
    }
    target_.OnView({layer_, kind_, offset_, source, region_->owner});
    return absl::OkStatus();
  }
  const bool streamed = array_.size() >= wire::kStreamedBytesMin;
  std::byte* const target = array_.data() + offset_;
  if (expected_.checksums) {
    return CompareSum(chunk, wire::CopyCrc32c(0, target, source, streamed));
  }
  if (streamed) {
    wire::StreamCopy(target, source.data(), source.size());
  } else {
    std::memcpy(target, source.data(), source.size());
  }
  return absl::OkStatus();
}

absl::Status KvReceiver::CheckRegion(const wire::KvChunk& chunk, int64_t bytes) const {
  const auto size = static_cast<uint64_t>(bytes);
  const uint64_t region = region_->bytes.size();
  if (chunk.region_offset <= region && size <= region - chunk.region_offset) {
    return absl::OkStatus();
  }
  return absl::DataLossError(
      absl::StrCat("chunk of ", Where(chunk.layer, chunk.kind, chunk.byte_offset),
                   " with ", size, " bytes at region_offset ", chunk.region_offset,
                   " is outside the shared memory of ", region, " bytes"));
}

absl::Status KvReceiver::CheckPlace(const wire::KvChunk& chunk) const {
  const std::string where = Where(chunk.layer, chunk.kind, chunk.byte_offset);
  if (complete()) {
    return absl::DataLossError(absl::StrCat("chunk of ", where, " after the last one"));
  }
  if (expected_.epoch.has_value() && chunk.ticket_epoch != *expected_.epoch) {
    return absl::DataLossError(absl::StrCat("chunk of ", where, " has epoch ",
                                            chunk.ticket_epoch, ", the ticket has ",
                                            *expected_.epoch));
  }
  if (chunk.layer != layer_ || chunk.kind != kind_ ||
      chunk.byte_offset != static_cast<uint64_t>(offset_)) {
    return absl::DataLossError(absl::StrCat("chunk of ", where,
                                            " is missing its predecessors or was sent "
                                            "twice; expected ",
                                            Where(layer_, kind_, offset_)));
  }
  if (chunk.dtype != expected_.dtype || chunk.layout != expected_.layout) {
    return absl::DataLossError(
        absl::StrCat("chunk of ", where, " has dtype ", static_cast<int>(chunk.dtype),
                     " and layout ", static_cast<int>(chunk.layout),
                     ", requested were ", static_cast<int>(expected_.dtype), " and ",
                     static_cast<int>(expected_.layout)));
  }
  const int64_t token = int64_t{chunk.token_begin} - expected_.token_begin;
  const int64_t head = int64_t{chunk.head_begin} - expected_.head_begin;
  // Inside what was asked first: products of what a chunk says may overflow.
  const bool inside = token >= 0 && chunk.token_count >= 0 &&
                      token + chunk.token_count <= expected_.token_count && head >= 0 &&
                      chunk.head_count >= 0 &&
                      head + chunk.head_count <= expected_.head_count;
  const int64_t row = expected_.layout == v1::NHD
                          ? token * expected_.head_count + head
                          : head * expected_.token_count + token;
  const int64_t rectangle =
      inside ? int64_t{chunk.token_count} * chunk.head_count * expected_.row_bytes()
             : 0;
  const auto sent = static_cast<int64_t>(chunk.payload.size());
  const int64_t payload = region_ != nullptr && sent == 0 ? rectangle : sent;
  if (!inside || (region_ != nullptr && sent != 0) ||
      row * expected_.row_bytes() != offset_ || rectangle != payload || payload == 0 ||
      payload > expected_.array_bytes() - offset_) {
    return absl::DataLossError(absl::StrCat(
        "chunk of ", where, " with ", payload, " bytes says tokens ", chunk.token_begin,
        "+", chunk.token_count, " of heads ", chunk.head_begin, "+", chunk.head_count,
        ", which does not fit there"));
  }
  if (expected_.dtype != v1::F8_E4M3 && chunk.scales.size() > 0) {
    return absl::DataLossError(
        absl::StrCat("chunk of ", where, " has scales, which only F8_E4M3 has"));
  }
  if (expected_.dtype == v1::F8_E4M3) {
    if (const std::string wrong = wire::CheckScales(chunk, expected_.page_tokens);
        !wrong.empty()) {
      return absl::DataLossError(absl::StrCat("chunk of ", where, " ", wrong));
    }
  }
  return absl::OkStatus();
}

absl::Status KvReceiver::CompareSum(const wire::KvChunk& chunk, uint32_t crc) {
  const std::string where = Where(chunk.layer, chunk.kind, chunk.byte_offset);
  if (!chunk.crc32c.has_value()) {
    return absl::DataLossError(absl::StrCat("chunk of ", where, " has no crc32c"));
  }
  if (crc != *chunk.crc32c) {
    return absl::DataLossError(absl::StrCat(
        "chunk of ", where, " is corrupt: crc32c ", absl::Hex(crc, absl::kZeroPad8),
        ", sent was ", absl::Hex(*chunk.crc32c, absl::kZeroPad8)));
  }
  digest_.Add(crc);
  return absl::OkStatus();
}

absl::Status KvReceiver::EndArray(const wire::KvChunk& chunk) {
  offset_ = 0;
  if (kind_ == v1::KvChunk::K) {
    kind_ = v1::KvChunk::V;
    return absl::OkStatus();
  }
  if (expected_.checksums && chunk.layer_digest != digest_.value()) {
    return absl::DataLossError(
        absl::StrCat("layer ", layer_, " is corrupt: digest ",
                     absl::Hex(digest_.value(), absl::kZeroPad8), ", sent was ",
                     chunk.layer_digest.has_value()
                         ? absl::StrCat(absl::Hex(*chunk.layer_digest, absl::kZeroPad8))
                         : "none"));
  }
  if (region_ != nullptr && !expected_.checksums) {
    if (absl::Status held = region_->still_held(); !held.ok()) return held;
  }
  digest_ = {};
  kind_ = v1::KvChunk::K;
  target_.OnLayer(layer_++);
  return absl::OkStatus();
}

std::optional<v1::KvPlace> KvReceiver::place() const {
  if (kind_ == v1::KvChunk::K && offset_ == 0) return std::nullopt;
  const auto row = static_cast<int32_t>(offset_ / expected_.row_bytes());
  v1::KvPlace place;
  place.set_kind(kind_);
  if (expected_.layout == v1::NHD) {
    place.set_head(expected_.head_begin);
    place.set_token(expected_.token_begin + row / expected_.head_count);
  } else {
    place.set_head(expected_.head_begin + row / expected_.token_count);
    place.set_token(expected_.token_begin + row % expected_.token_count);
  }
  return place;
}

void KvReceiver::Resume() {
  digest_ = {};
  resumed_ = true;
}

void KvReceiver::Rewind() {
  bytes_ -= offset_ + (kind_ == v1::KvChunk::V ? expected_.array_bytes() : 0);
  offset_ = 0;
  kind_ = v1::KvChunk::K;
  digest_ = {};
}

}  // namespace pbs::client
