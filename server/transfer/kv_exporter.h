// Makes the chunks of kv.proto from a held cache.
//
// Every requested (layer, kind) array is sent as contiguous byte ranges in the
// requested layout. Each range is a rectangle of tokens and heads, cut at page
// boundaries. Where the cache holds the range in the requested form, a chunk points
// into the cache and nothing is copied. Else the range is copied to a buffer of at most
// chunk_bytes.
//
// Threading: one thread at a time. Memory: it and every unsent slice own a reference to
// the cache; one buffer per copied chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

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

class KvExporter {
 public:
  // InvalidArgument when one page of tokens (NHD: of all requested heads; HND: of one
  // head) exceeds chunk_bytes, or when queries are wanted and no layer of the range was
  // captured.
  static absl::StatusOr<std::unique_ptr<KvExporter>> Create(
      std::shared_ptr<const HeldKv> kv, uint64_t epoch, const KvRange& range,
      const KvFormat& format, KvContent content = KvContent::kKeysAndValues);

  bool done() const { return layer_ == LayerEnd(); }
  // The layer of the next chunk; it must be ready before Next().
  int32_t layer() const { return layer_; }
  // Requires !done() and a ready layer().
  wire::KvChunk Next();

  // Bytes that one chunk allocates; 0 when chunks point into the cache.
  static int64_t BufferBytes(const KvShape& shape, const KvRange& range,
                             const KvFormat& format,
                             KvContent content = KvContent::kKeysAndValues);
  // Payload of all chunks.
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
  int64_t RowBytes() const;
  int64_t ArrayBytes() const;  // bytes of one (layer, kind) array
  wire::Payload Point(const wire::KvChunk& chunk, int64_t bytes) const;
  wire::Payload Copy(const wire::KvChunk& chunk, int64_t bytes) const;
  const std::byte* Row(int32_t head, int32_t token) const;

  const std::shared_ptr<const HeldKv> kv_;
  const KvContent content_;
  const KvShape shape_;
  const uint64_t epoch_;
  const KvRange range_;
  const KvFormat format_;
  const DType dtype_;  // requested
  const bool copies_;
  int32_t layer_;
  v1::KvChunk::Kind kind_;
  int64_t byte_offset_ = 0;  // within the (layer, kind) array
  wire::LayerDigest digest_;
};

}  // namespace pbs::server
