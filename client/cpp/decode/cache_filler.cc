#include "client/cpp/decode/cache_filler.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "pbs/check.h"

namespace pbs::decode {

CacheFiller::CacheFiller(KvCache& cache, int32_t num_tokens,
                         std::function<void(int32_t)> on_layer)
    : cache_(cache), num_tokens_(num_tokens), on_layer_(std::move(on_layer)) {
  PBS_CHECK(num_tokens <= cache.shape().capacity);
}

int64_t CacheFiller::head_bytes() const {
  const KvShape& shape = cache_.shape();
  return int64_t{num_tokens_} * shape.head_dim * DTypeBytes(shape.dtype);
}

std::span<std::byte> CacheFiller::Array(int32_t layer, v1::KvChunk::Kind kind,
                                        int64_t bytes) {
  const KvShape& shape = cache_.shape();
  if (layer >= shape.num_layers || bytes != shape.num_kv_heads * head_bytes()) {
    return {};
  }
  std::vector<std::byte>& array = kind == v1::KvChunk::K ? keys_ : values_;
  array.resize(static_cast<size_t>(bytes));
  return array;
}

void CacheFiller::Place(const std::vector<std::byte>& array, void* plane) const {
  const KvShape& shape = cache_.shape();
  const int64_t stride = cache_.head_stride() * DTypeBytes(shape.dtype);
  for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
    std::memcpy(static_cast<std::byte*>(plane) + head * stride,
                array.data() + head * head_bytes(), static_cast<size_t>(head_bytes()));
  }
}

void CacheFiller::OnLayer(int32_t layer) {
  Place(keys_, cache_.k(layer));
  Place(values_, cache_.v(layer));
  on_layer_(layer + 1);
}

}  // namespace pbs::decode
