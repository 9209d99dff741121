// The format of a sent cache: the checked options of a FetchRequest or of a
// delivery, and the dtypes of the wire.
//
// Threading: values and stateless functions.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "pbs/dtype.h"
#include "pbs/v1/kv.pb.h"
#include "pbs/v1/prefill.pb.h"
#include "pbs/v1/types.pb.h"

namespace pbs::server {

inline constexpr int32_t kChunkBytesMin = 64 << 10;
inline constexpr int32_t kChunkBytesMax = 4 << 20;
// The longest payload. A chunk's message, fields included, then fits gRPC's default
// limit of 4 MiB for received messages.
inline constexpr int32_t kChunkPayloadBytesMax = kChunkBytesMax - (4 << 10);

v1::DType EncodeDType(DType dtype);
// Decodes F32, F16 or BF16. For other values InvalidArgument names `field`, the value
// and these three.
absl::StatusOr<DType> DecodeDType(absl::string_view field, v1::DType dtype);

enum class KvLayout : uint8_t {
  kHnd,
  kNhd
};  // [heads, tokens, dim], [tokens, heads, dim]

v1::KvLayout EncodeLayout(KvLayout layout);

struct KvFormat {
  std::optional<DType> dtype = {};  // unset: as held, or F8_E4M3
  KvLayout layout = KvLayout::kHnd;
  int32_t page_tokens = 1;  // chunks begin and end at multiples of it
  int32_t chunk_bytes = 0;  // the longest payload; at most kChunkPayloadBytesMax
  bool checksums = true;
  bool fp8 = false;  // sent as F8_E4M3, with a scale for each page of each head
  // Chunks have no payload; they name places in the memory of the cache.
  bool shared_memory = false;

  // Of a sent element of a cache that is held in `held`.
  v1::DType WireDType(DType held) const;
  int64_t ElementBytes(DType held) const;
};

// `chunk_bytes_default` is the server's. InvalidArgument names field, value and limit.
// Queries are not sent as F8_E4M3. Whether a cache has what shared_memory asks for,
// CheckSharedMemory() decides.
absl::StatusOr<KvFormat> DecodeKvFormat(const v1::FetchRequest& request,
                                        int32_t chunk_bytes_default);
// Of a KvDelivery::Inline or ::Push.
template <class Delivery>
absl::StatusOr<KvFormat> DecodeKvFormat(const Delivery& delivery,
                                        int32_t chunk_bytes_default);

// Shared memory has the bytes as they are held. InvalidArgument names the field of a
// request for shared_memory that asks for others.
absl::Status CheckSharedMemory(const v1::FetchRequest& request, DType held);

}  // namespace pbs::server
