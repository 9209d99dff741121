#include "server/transfer/kv_exporter.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pbs/check.h"
#include "server/base/status.h"
#include "server/transfer/fp8_pages.h"

namespace pbs::server {
namespace {

// [begin, begin + count) inside [0, size), count >= 1. Unset: from 0, to the end.
absl::Status DecodeRange(absl::string_view what, bool has_begin, int32_t begin,
                         bool has_count, int32_t count, int32_t size,
                         int32_t* range_begin, int32_t* range_count) {
  if (!has_begin) begin = 0;
  if (begin < 0 || begin >= size) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, "_begin ", begin, " is outside [0, ", size - 1, "]"));
  }
  if (!has_count) count = size - begin;
  if (count < 1 || count > size - begin) {
    return absl::InvalidArgumentError(absl::StrCat(what, "_count ", count,
                                                   " is outside [1, ", size - begin,
                                                   "] from ", what, "_begin ", begin));
  }
  *range_begin = begin;
  *range_count = count;
  return absl::OkStatus();
}

// Where the asked range does not lie in memory as it is asked for. Queries are held by
// token, and nearly always asked for by head.
bool Copies(const KvShape& shape, const KvRange& range, const KvFormat& format,
            KvContent content) {
  return content == KvContent::kQueries || format.fp8 ||
         format.dtype.value_or(shape.dtype) != shape.dtype ||
         (format.layout == KvLayout::kNhd && range.head_count > 1);
}

constexpr int64_t kScaleBytes = 4;
// A chunk of n tokens has at most n / page_tokens + 2 pages.
constexpr int64_t kCutPages = 2;

// Bytes of a chunk with one page of one head.
int64_t PageBytes(int64_t tokens, int64_t row_bytes, const KvFormat& format) {
  if (!format.fp8) return tokens * row_bytes;
  const int64_t scales = (kScaleBytes * tokens - 1) / format.page_tokens + 1;
  return tokens * row_bytes + scales + kCutPages * kScaleBytes;
}

}  // namespace

KvShape ShapeOf(const HeldKv& kv, KvContent content) {
  KvShape shape = kv.cache().shape();
  if (content == KvContent::kQueries) {
    shape.num_kv_heads = kv.queries().shape().num_heads;
  }
  return shape;
}

KvRange WholeRange(const KvShape& shape) {
  return {0, shape.num_layers, 0, shape.capacity, 0, shape.num_kv_heads};
}

absl::StatusOr<KvRange> DecodeKvRange(const v1::FetchRequest& request,
                                      const KvShape& shape) {
  KvRange range;
  PBS_ABSL_RETURN_IF_ERROR(DecodeRange("layer", request.has_layer_begin(),
                                       request.layer_begin(), request.has_layer_count(),
                                       request.layer_count(), shape.num_layers,
                                       &range.layer_begin, &range.layer_count));
  PBS_ABSL_RETURN_IF_ERROR(DecodeRange("token", request.has_token_begin(),
                                       request.token_begin(), request.has_token_count(),
                                       request.token_count(), shape.capacity,
                                       &range.token_begin, &range.token_count));
  PBS_ABSL_RETURN_IF_ERROR(DecodeRange(
      "head", request.has_head_begin(), request.head_begin(), request.has_head_count(),
      request.head_count(), shape.num_kv_heads, &range.head_begin, &range.head_count));
  return range;
}

absl::StatusOr<std::optional<KvPlace>> DecodeKvPlace(const v1::FetchRequest& request,
                                                     const KvRange& range) {
  if (!request.has_resume()) return std::nullopt;
  const v1::KvPlace& place = request.resume();
  const bool fits = request.queries() ? place.kind() == v1::KvChunk::Q
                                      : place.kind() == v1::KvChunk::K ||
                                            place.kind() == v1::KvChunk::V;
  if (!fits) {
    return absl::InvalidArgumentError(absl::StrCat(
        "resume.kind ", static_cast<int>(place.kind()), " is not ",
        request.queries() ? "Q (3), the kind of queries" : "one of K (1), V (2)"));
  }
  const auto check = [](absl::string_view field, int32_t value, int32_t begin,
                        int32_t count) {
    if (value >= begin && value - begin < count) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("resume.", field, " ", value,
                                                   " is outside [", begin, ", ",
                                                   begin + count - 1, "]"));
  };
  PBS_ABSL_RETURN_IF_ERROR(
      check("head", place.head(), range.head_begin, range.head_count));
  PBS_ABSL_RETURN_IF_ERROR(
      check("token", place.token(), range.token_begin, range.token_count));
  if (request.layout() == v1::NHD && place.head() != range.head_begin) {
    return absl::InvalidArgumentError(absl::StrCat(
        "resume.head ", place.head(), " is not head_begin ", range.head_begin,
        ": in layout NHD a chunk begins with the first head of a token"));
  }
  return KvPlace{place.kind(), place.head(), place.token()};
}

absl::StatusOr<std::unique_ptr<KvExporter>> KvExporter::Create(
    std::shared_ptr<const HeldKv> kv, uint64_t epoch, const KvRange& range,
    const KvFormat& format, KvContent content, const std::optional<KvPlace>& resume) {
  auto exporter = std::unique_ptr<KvExporter>(
      new KvExporter(std::move(kv), epoch, range, format, content));
  if (exporter->done()) {
    return absl::InvalidArgumentError(
        absl::StrCat("queries true: none of the layers [", range.layer_begin, ", ",
                     exporter->LayerEnd(), ") was captured"));
  }
  const int64_t heads = format.layout == KvLayout::kNhd ? range.head_count : 1;
  const int64_t tokens = std::min(format.page_tokens, range.token_count);
  const int64_t page_bytes = heads * PageBytes(tokens, exporter->RowBytes(), format);
  if (page_bytes > format.chunk_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a page of ", tokens, " tokens has ", page_bytes,
                     " bytes, more than chunk_bytes ", format.chunk_bytes));
  }
  if (resume.has_value()) {
    if (exporter->layer_ != range.layer_begin) {
      return absl::InvalidArgumentError(
          absl::StrCat("resume is in layer_begin ", range.layer_begin,
                       ", whose queries were not captured"));
    }
    exporter->Begin(*resume);
  }
  return exporter;
}

KvExporter::KvExporter(std::shared_ptr<const HeldKv> kv, uint64_t epoch,
                       const KvRange& range, const KvFormat& format, KvContent content)
    : kv_(std::move(kv)),
      content_(content),
      shape_(ShapeOf(*kv_, content)),
      epoch_(epoch),
      range_(range),
      format_(format),
      dtype_(format.dtype.value_or(shape_.dtype)),
      element_bytes_(format.ElementBytes(shape_.dtype)),
      copies_(Copies(shape_, range, format, content)),
      layer_(NextLayer(range.layer_begin)),
      kind_(has_queries() ? v1::KvChunk::Q : v1::KvChunk::K) {}

int32_t KvExporter::NextLayer(int32_t layer) const {
  return has_queries() ? kv_->queries().NextLayer(layer, LayerEnd()) : layer;
}

int64_t KvExporter::BufferBytes(const KvShape& shape, const KvRange& range,
                                const KvFormat& format, KvContent content) {
  return Copies(shape, range, format, content) ? format.chunk_bytes : 0;
}

// The bytes of n rows are at most those of PageBytes(), of each of their heads.
int64_t KvExporter::RowsMax(int64_t heads) const {
  if (!format_.fp8) return format_.chunk_bytes / (heads * RowBytes());
  const int64_t page = format_.page_tokens;
  return (format_.chunk_bytes - heads * kCutPages * kScaleBytes) * page /
         (heads * (RowBytes() * page + kScaleBytes));
}

int64_t KvExporter::Pages(int64_t token_begin, int64_t token_count) const {
  const int64_t last = (token_begin + token_count - 1) / format_.page_tokens;
  return last - token_begin / format_.page_tokens + 1;
}

void KvExporter::Begin(const KvPlace& place) {
  const int64_t token = place.token - range_.token_begin;
  const int64_t head = place.head - range_.head_begin;
  const int64_t row = format_.layout == KvLayout::kNhd
                          ? token * range_.head_count + head
                          : head * range_.token_count + token;
  kind_ = place.kind;
  byte_offset_ = row * RowBytes();
  skipped_bytes_ = byte_offset_ + (kind_ == v1::KvChunk::V ? ArrayBytes() : 0);
}

int64_t KvExporter::ArrayBytes() const {
  return static_cast<int64_t>(range_.token_count) * range_.head_count * RowBytes();
}

int64_t KvExporter::total_bytes() const {
  if (!has_queries()) return 2 * range_.layer_count * ArrayBytes() - skipped_bytes_;
  int64_t bytes = -skipped_bytes_;
  for (int32_t layer = NextLayer(range_.layer_begin); layer < LayerEnd();
       layer = NextLayer(layer + 1)) {
    bytes += ArrayBytes();
  }
  return bytes;
}

int64_t KvExporter::held_bytes() const {
  return total_bytes() / element_bytes_ * DTypeBytes(shape_.dtype);
}

wire::KvChunk KvExporter::Next() {
  PBS_CHECK(!done());
  wire::KvChunk chunk;
  chunk.ticket_epoch = epoch_;
  chunk.layer = layer_;
  chunk.kind = kind_;
  chunk.dtype = format_.WireDType(shape_.dtype);
  chunk.layout = EncodeLayout(format_.layout);
  chunk.byte_offset = static_cast<uint64_t>(byte_offset_);
  CutNext(chunk);
  const int64_t bytes = BytesOf(chunk);
  if (format_.shared_memory) {
    chunk.region_offset = RegionOffset(chunk);
  } else if (format_.fp8) {
    CopyFp8(chunk, bytes);
  } else {
    chunk.payload = copies_ ? Copy(chunk, bytes) : Point(chunk, bytes);
  }
  byte_offset_ += bytes;

  const bool array_ends = byte_offset_ == ArrayBytes();
  const bool layer_ends = array_ends && kind_ != v1::KvChunk::K;
  if (format_.checksums) {
    chunk.crc32c = format_.shared_memory
                       ? wire::Crc32c(kv_->region()->bytes().subspan(
                             chunk.region_offset, static_cast<size_t>(bytes)))
                       : wire::Crc32cOf(chunk);
    digest_.Add(*chunk.crc32c);
    if (layer_ends) chunk.layer_digest = digest_.value();
  }
  if (array_ends) {
    byte_offset_ = 0;
    if (!has_queries()) kind_ = layer_ends ? v1::KvChunk::K : v1::KvChunk::V;
  }
  if (layer_ends) {
    layer_ = NextLayer(layer_ + 1);
    digest_ = {};
  }
  return chunk;
}

// The largest rectangle from here on that is contiguous in the asked layout, fits
// chunk_bytes and ends at a page.
void KvExporter::CutNext(wire::KvChunk& chunk) const {
  const bool nhd = format_.layout == KvLayout::kNhd;
  const int64_t row_heads = nhd ? range_.head_count : 1;
  // NHD: token; HND: head, then token
  const int64_t row = byte_offset_ / (row_heads * RowBytes());
  const int64_t rows_max = RowsMax(row_heads);
  const auto token = static_cast<int32_t>(row % range_.token_count);
  const auto head = static_cast<int32_t>(row / range_.token_count);  // NHD: 0

  chunk.token_begin = range_.token_begin + token;
  chunk.head_begin = range_.head_begin + head;
  chunk.head_count = nhd ? range_.head_count : 1;
  const int32_t token_end = range_.token_begin + range_.token_count;
  int64_t end = token_end;
  if (token_end - chunk.token_begin > rows_max) {
    end = (chunk.token_begin + rows_max) / format_.page_tokens * format_.page_tokens;
  }
  chunk.token_count = static_cast<int32_t>(end) - chunk.token_begin;
  // Whole heads go together where they lie together, or are copied anyway.
  const bool joins = copies_ || range_.token_count == shape_.capacity;
  if (!nhd && joins && chunk.token_count == range_.token_count) {
    const int64_t head_bytes =
        range_.token_count * RowBytes() +
        (format_.fp8 ? kScaleBytes * Pages(range_.token_begin, range_.token_count) : 0);
    chunk.head_count = static_cast<int32_t>(
        std::min<int64_t>(format_.chunk_bytes / head_bytes, range_.head_count - head));
  }
}

const std::byte* KvExporter::Row(int32_t head, int32_t token) const {
  const int64_t bytes = DTypeBytes(shape_.dtype);
  if (has_queries()) {
    const int64_t row = int64_t{token} * shape_.num_kv_heads + head;
    return static_cast<const std::byte*>(kv_->queries().data(layer_)) +
           row * shape_.head_dim * bytes;
  }
  const KvCache& cache = kv_->cache();
  const void* plane = kind_ == v1::KvChunk::K ? cache.k(layer_) : cache.v(layer_);
  const int64_t element = cache.layout().Offset(0, 0, head, token);
  return static_cast<const std::byte*>(plane) + element * bytes;
}

int64_t KvExporter::BytesOf(const wire::KvChunk& chunk) const {
  return static_cast<int64_t>(chunk.token_count) * chunk.head_count * RowBytes();
}

uint64_t KvExporter::RegionOffset(const wire::KvChunk& chunk) const {
  return static_cast<uint64_t>(Row(chunk.head_begin, chunk.token_begin) -
                               kv_->region()->bytes().data());
}

wire::Payload KvExporter::Point(const wire::KvChunk& chunk, int64_t bytes) const {
  return wire::Payload(wire::SliceOf(Row(chunk.head_begin, chunk.token_begin),
                                     static_cast<size_t>(bytes), kv_));
}

wire::Payload KvExporter::Copy(const wire::KvChunk& chunk, int64_t bytes) const {
  grpc::Slice slice(static_cast<size_t>(bytes));
  auto* target = reinterpret_cast<std::byte*>(const_cast<uint8_t*>(slice.begin()));
  const auto copy_rows = [&](int32_t head, int32_t token, int64_t rows) {
    ConvertElements(Row(head, token), shape_.dtype, target, dtype_,
                    rows * shape_.head_dim);
    target += rows * RowBytes();
  };
  const int32_t head_end = chunk.head_begin + chunk.head_count;
  const int32_t token_end = chunk.token_begin + chunk.token_count;
  if (format_.layout == KvLayout::kHnd) {
    for (int32_t head = chunk.head_begin; head < head_end; ++head) {
      // Tokens of a head follow one another in a cache, but not in captured queries.
      const int32_t rows = has_queries() ? 1 : chunk.token_count;
      for (int32_t token = chunk.token_begin; token < token_end; token += rows) {
        copy_rows(head, token, rows);
      }
    }
    return wire::Payload(std::move(slice));
  }
  for (int32_t token = chunk.token_begin; token < token_end; ++token) {
    for (int32_t head = chunk.head_begin; head < head_end; ++head) {
      copy_rows(head, token, 1);
    }
  }
  return wire::Payload(std::move(slice));
}

void KvExporter::CopyFp8(wire::KvChunk& chunk, int64_t bytes) const {
  const int64_t page_tokens = format_.page_tokens;
  const int64_t token_end = chunk.token_begin + chunk.token_count;
  const int64_t dim = shape_.head_dim;
  const bool nhd = format_.layout == KvLayout::kNhd;
  grpc::Slice payload(static_cast<size_t>(bytes));
  grpc::Slice scales(static_cast<size_t>(kScaleBytes * chunk.head_count *
                                         Pages(chunk.token_begin, chunk.token_count)));
  auto* target = const_cast<uint8_t*>(payload.begin());
  auto* scale_target = const_cast<uint8_t*>(scales.begin());
  const auto encode = [&](int32_t head, int64_t token, int64_t rows, float scale) {
    const int64_t column = head - chunk.head_begin;
    const int64_t line = token - chunk.token_begin;
    const int64_t row =
        nhd ? line * chunk.head_count + column : column * chunk.token_count + line;
    EncodeFp8(Row(head, static_cast<int32_t>(token)), shape_.dtype, rows * dim, scale,
              target + row * dim);
  };
  for (int32_t head = chunk.head_begin; head < chunk.head_begin + chunk.head_count;
       ++head) {
    for (int64_t token = chunk.token_begin; token < token_end;) {
      const int64_t page = token / page_tokens * page_tokens;
      const int64_t page_end = std::min<int64_t>(page + page_tokens, shape_.capacity);
      const float scale = PageScale(Row(head, static_cast<int32_t>(page)), shape_.dtype,
                                    (page_end - page) * dim);
      std::memcpy(scale_target, &scale, sizeof(scale));
      scale_target += sizeof(scale);
      const int64_t end = std::min(page_end, token_end);
      // In NHD the rows of a head are apart.
      const int64_t rows = nhd ? 1 : end - token;
      for (; token < end; token += rows) encode(head, token, rows, scale);
    }
  }
  chunk.scales = wire::Payload(std::move(scales));
  chunk.payload = wire::Payload(std::move(payload));
}

}  // namespace pbs::server
