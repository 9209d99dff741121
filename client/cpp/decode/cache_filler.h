// Fills a KV cache from a fetch.
//
// It collects a layer's arrays beside the cache and moves them into it when the layer
// is complete and its checksums are right, so that decoding never reads unchecked
// bytes.
//
// Threading: one thread, that of the fetch. Memory: one layer's keys and values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "client/cpp/kv_receiver.h"
#include "server/model/kv_cache.h"

namespace pbs::decode {

class CacheFiller final : public client::KvTarget {
 public:
  // Fills the first `num_tokens` tokens of `cache`, which must be in host memory and
  // outlive this. Calls `on_layer` with the number of layers that are in place.
  CacheFiller(KvCache& cache, int32_t num_tokens,
              std::function<void(int32_t)> on_layer);

  std::span<std::byte> Array(int32_t layer, v1::KvChunk::Kind kind,
                             int64_t bytes) override;
  void OnLayer(int32_t layer) override;

 private:
  // Bytes of one head of a sent array, [kv_heads, num_tokens, head_dim].
  int64_t head_bytes() const;
  void Place(const std::vector<std::byte>& array, void* plane) const;

  KvCache& cache_;
  const int32_t num_tokens_;
  const std::function<void(int32_t)> on_layer_;
  std::vector<std::byte> keys_, values_;
};

}  // namespace pbs::decode
