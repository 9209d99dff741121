#include "server/codec/kv_format.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"
#include "pbs/limits.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

absl::StatusOr<KvLayout> DecodeLayout(v1::KvLayout layout) {
  switch (layout) {
    case v1::KV_LAYOUT_UNSPECIFIED:
    case v1::HND:
      return KvLayout::kHnd;
    case v1::NHD:
      return KvLayout::kNhd;
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          "layout ", static_cast<int>(layout), " is not one of NHD (",
          static_cast<int>(v1::NHD), "), HND (", static_cast<int>(v1::HND), ")"));
  }
}

// The wishes that all of these messages have.
template <class Wishes>
absl::StatusOr<KvFormat> DecodeCommon(const Wishes& wishes,
                                      int32_t chunk_bytes_default) {
  KvFormat format;
  format.fp8 = wishes.has_dtype() && wishes.dtype() == v1::F8_E4M3;
  if (wishes.has_dtype() && !format.fp8) {
    const absl::StatusOr<DType> dtype = DecodeDType("dtype", wishes.dtype());
    if (!dtype.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(dtype.status().message(), ", F8_E4M3"));
    }
    format.dtype = *dtype;
  }
  PBS_ABSL_ASSIGN_OR_RETURN(format.layout, DecodeLayout(wishes.layout()));
  format.chunk_bytes =
      wishes.has_chunk_bytes() ? wishes.chunk_bytes() : chunk_bytes_default;
  if (format.chunk_bytes < kChunkBytesMin || format.chunk_bytes > kChunkBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("chunk_bytes ", format.chunk_bytes,
                                                   " is outside [", kChunkBytesMin,
                                                   ", ", kChunkBytesMax, "]"));
  }
  format.chunk_bytes = std::min(format.chunk_bytes, kChunkPayloadBytesMax);
  if (wishes.has_checksums()) format.checksums = wishes.checksums();
  if (wishes.has_page_tokens()) format.page_tokens = wishes.page_tokens();
  if (format.page_tokens < 1 || format.page_tokens > kSeqLenMax) {
    return absl::InvalidArgumentError(absl::StrCat(
        "page_tokens ", format.page_tokens, " is outside [1, ", kSeqLenMax, "]"));
  }
  return format;
}

}  // namespace

v1::DType EncodeDType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return v1::F32;
    case DType::kF16:
      return v1::F16;
    case DType::kBF16:
      return v1::BF16;
  }
  return v1::DTYPE_UNSPECIFIED;
}

absl::StatusOr<DType> DecodeDType(absl::string_view field, v1::DType dtype) {
  switch (dtype) {
    case v1::F32:
      return DType::kF32;
    case v1::F16:
      return DType::kF16;
    case v1::BF16:
      return DType::kBF16;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat(field, " ",
                       v1::DType_IsValid(dtype) ? v1::DType_Name(dtype)
                                                : absl::StrCat(static_cast<int>(dtype)),
                       " is not one of F32, F16, BF16"));
  }
}

v1::DType KvFormat::WireDType(DType held) const {
  return fp8 ? v1::F8_E4M3 : EncodeDType(dtype.value_or(held));
}

int64_t KvFormat::ElementBytes(DType held) const {
  return fp8 ? 1 : DTypeBytes(dtype.value_or(held));
}

v1::KvLayout EncodeLayout(KvLayout layout) {
  return layout == KvLayout::kHnd ? v1::HND : v1::NHD;
}

absl::StatusOr<KvFormat> DecodeKvFormat(const v1::FetchRequest& request,
                                        int32_t chunk_bytes_default) {
  PBS_ABSL_ASSIGN_OR_RETURN(KvFormat format,
                            DecodeCommon(request, chunk_bytes_default));
  if (format.fp8 && request.queries()) {
    return absl::InvalidArgumentError(
        "dtype F8_E4M3 of queries is not one of F32, F16, BF16");
  }
  format.shared_memory = request.shared_memory();
  return format;
}

template <class Delivery>
absl::StatusOr<KvFormat> DecodeKvFormat(const Delivery& delivery,
                                        int32_t chunk_bytes_default) {
  return DecodeCommon(delivery, chunk_bytes_default);
}

template absl::StatusOr<KvFormat> DecodeKvFormat(const v1::KvDelivery::Inline& delivery,
                                                 int32_t chunk_bytes_default);
template absl::StatusOr<KvFormat> DecodeKvFormat(const v1::KvDelivery::Push& delivery,
                                                 int32_t chunk_bytes_default);

absl::Status CheckSharedMemory(const v1::FetchRequest& request, DType held) {
  const auto refuse = [](absl::string_view field, absl::string_view why) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, " with shared_memory true: ", why));
  };
  if (request.queries()) {
    return refuse("queries true", "captured queries are not in shared memory");
  }
  if (request.has_dtype() && request.dtype() != EncodeDType(held)) {
    return refuse(
        absl::StrCat("dtype ", v1::DType_Name(request.dtype())),
        absl::StrCat("the cache is held as ", v1::DType_Name(EncodeDType(held)),
                     ", and only that is in shared memory"));
  }
  if (request.layout() == v1::NHD) {
    return refuse("layout NHD",
                  "the cache is held as HND, and only that is in shared "
                  "memory");
  }
  return absl::OkStatus();
}

}  // namespace pbs::server
