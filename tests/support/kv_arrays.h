// Memory for a fetched KV cache.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "client/cpp/kv_receiver.h"

namespace pbs::testing_support {

// Arrays, indexed by (layer, kind).
struct KvArrays final : client::KvTarget {
  std::span<std::byte> Array(int32_t layer, v1::KvChunk::Kind kind,
                             int64_t bytes) override {
    auto& array = arrays[{layer, kind}];
    array.resize(static_cast<size_t>(bytes));
    return array;
  }
  void OnLayer(int32_t layer) override {
    layers.push_back(layer);
    if (on_layer) on_layer(layer);
  }

  std::map<std::pair<int32_t, int>, std::vector<std::byte>> arrays;
  std::vector<int32_t> layers;
  std::function<void(int32_t)> on_layer;
};

}  // namespace pbs::testing_support
