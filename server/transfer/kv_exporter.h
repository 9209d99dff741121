// Makes the chunks of kv.proto from a held cache.
//
// Every requested (layer, kind) array is sent as contiguous byte ranges in the
// requested layout. Each range is a rectangle of tokens and heads, cut at page
// boundaries. Where the cache holds the range in the requested form, a chunk points
// into the cache and nothing is copied. Else the range is copied to a buffer of at most
// chunk_bytes, which with F8_E4M3 also has the scales. With KvFormat::shared_memory a
// chunk names its place and nothing is sent.
//
// Threading: one thread at a time. Memory: it and every unsent slice own a reference to
// the cache; one buffer per copied chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "pbs/v1/kv.pb.h"
#include "proto/wire/crc32c.h"
#include "proto/wire/messages.h"
#include "server/codec/kv_format.h"
#include "server/engine/held_kv.h"

namespace pbs::server {

// A range of layers, tokens and heads inside a cache's shape.
struct KvRange {
  int32_t layer_begin = 0, layer_count = 0;
  int32_t token_begin = 0, token_count = 0;
  int32_t head_begin = 0, head_count = 0;
};

// The first row that a fetch sends of the first layer of its range: the kind, and the
// absolute head and token, inside the range.
struct KvPlace {
  v1::KvChunk::Kind kind = v1::KvChunk::K;
  int32_t head = 0;
  int32_t token = 0;
};

// What a fetch sends: keys and values of every layer, or the queries of the captured
// layers.
enum class KvContent : uint8_t { kKeysAndValues, kQueries };

// The shape of the content, whose heads are then query heads.
KvShape ShapeOf(const HeldKv& kv, KvContent content);

// The range of all of `shape`: the capacity of a held cache is the length of its
// prompt.
KvRange WholeRange(const KvShape& shape);
// The range of a request. InvalidArgument names field, value and limit.
absl::StatusOr<KvRange> DecodeKvRange(const v1::FetchRequest& request,
                                      const KvShape& shape);
// Where a request resumes; nullopt when it begins. Errors as DecodeKvRange().
absl::StatusOr<std::optional<KvPlace>> DecodeKvPlace(const v1::FetchRequest& request,
                                                     const KvRange& range);

class KvExporter {
 public:
  // InvalidArgument when one page of tokens (NHD: of all requested heads; HND: of one
  // head; with F8_E4M3 scales count) exceeds chunk_bytes, when queries are wanted and
  // no layer of the range was captured, or when `resume` is in a layer that was not.
  // With format.shared_memory the cache has a region and the request passed
  // CheckSharedMemory().
  static absl::StatusOr<std::unique_ptr<KvExporter>> Create(
      std::shared_ptr<const HeldKv> kv, uint64_t epoch, const KvRange& range,
      const KvFormat& format, KvContent content = KvContent::kKeysAndValues,
      const std::optional<KvPlace>& resume = {});

  bool done() const { return layer_ == LayerEnd(); }
  // The layer of the next chunk; it must be ready before Next().
  int32_t layer() const { return layer_; }
  // Requires !done() and a ready layer().
  wire::KvChunk Next();

  // Bytes that one chunk allocates; 0 when chunks point into the cache.
  static int64_t BufferBytes(const KvShape& shape, const KvRange& range,
                             const KvFormat& format,
                             KvContent content = KvContent::kKeysAndValues);
  // Bytes of the cache's elements that `chunk` has or, in shared memory, names.
  int64_t BytesOf(const wire::KvChunk& chunk) const;
  // Payload of all chunks, without what was had before a resume.
  int64_t total_bytes() const;
  // Bytes of the same elements in the cache.
  int64_t held_bytes() const;

 private:
  KvExporter(std::shared_ptr<const HeldKv> kv, uint64_t epoch, const KvRange& range,
             const KvFormat& format, KvContent content);

  int32_t LayerEnd() const { return range_.layer_begin + range_.layer_count; }
  // The first layer with content that is at least `layer`; else LayerEnd().
  int32_t NextLayer(int32_t layer) const;
  bool has_queries() const { return content_ == KvContent::kQueries; }
  // Sets the token and head ranges of the next chunk.
  void CutNext(wire::KvChunk& chunk) const;
  // Bytes of one token of one head, in the requested dtype.
  int64_t RowBytes() const { return shape_.head_dim * element_bytes_; }
  // The most rows of a chunk, each of `heads` heads of a token.
  int64_t RowsMax(int64_t heads) const;
  // Pages that have a token of [token_begin, token_begin + token_count).
  int64_t Pages(int64_t token_begin, int64_t token_count) const;
  void Begin(const KvPlace& place);
  int64_t ArrayBytes() const;  // bytes of one (layer, kind) array
  uint64_t RegionOffset(const wire::KvChunk& chunk) const;
  wire::Payload Point(const wire::KvChunk& chunk, int64_t bytes) const;
  wire::Payload Copy(const wire::KvChunk& chunk, int64_t bytes) const;
  // Sets scales and payload.
  void CopyFp8(wire::KvChunk& chunk, int64_t bytes) const;
  const std::byte* Row(int32_t head, int32_t token) const;

  const std::shared_ptr<const HeldKv> kv_;
  const KvContent content_;
  const KvShape shape_;
  const uint64_t epoch_;
  const KvRange range_;
  const KvFormat format_;
  const DType dtype_;  // requested; as held with F8_E4M3
  const int64_t element_bytes_;
  const bool copies_;
  int32_t layer_;
  v1::KvChunk::Kind kind_;
  int64_t byte_offset_ = 0;    // within the (layer, kind) array
  int64_t skipped_bytes_ = 0;  // before the place that it resumed at
  wire::LayerDigest digest_;
};

}  // namespace pbs::server
