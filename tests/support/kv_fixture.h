// Held caches with known contents, for tests of their transfer.
#pragma once

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "pbs/cpu_backend.h"
#include "server/engine/held_kv.h"

namespace pbs::testing_support {

inline Backend& OneThreadBackend() {
  static const std::unique_ptr<Backend> backend = *CreateCpuBackend({.num_threads = 1});
  return *backend;
}

// Element i of plane p (K of layer 0, V of layer 0, K of layer 1 ...): a value that f16
// and bf16 hold exactly and that differs between neighbours.
inline float KvElement(int64_t plane, int64_t element) {
  return static_cast<float>((plane * 31 + element) % 256) - 128;
}

// The queries of captured layer l are those of plane -1 - l, token by token.
inline CapturedQueries MakeQueries(const QueryShape& shape,
                                   const std::vector<int32_t>& layers) {
  CapturedQueries queries = *CapturedQueries::Create(shape, layers, OneThreadBackend());
  for (int32_t layer : layers) {
    const int64_t count = shape.layer_bytes() / DTypeBytes(shape.dtype);
    std::vector<float> values(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) values[i] = KvElement(-1 - layer, i);
    ConvertElements(values.data(), DType::kF32, queries.data(layer), shape.dtype,
                    count);
  }
  return queries;
}

inline void FillKv(const KvShape& shape, KvCache& cache) {
  for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
    for (int kind = 0; kind < 2; ++kind) {
      void* plane = kind == 0 ? cache.k(layer) : cache.v(layer);
      const int64_t count = shape.plane_bytes() / DTypeBytes(shape.dtype);
      std::vector<float> values(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) values[i] = KvElement(2 * layer + kind, i);
      ConvertElements(values.data(), DType::kF32, plane, shape.dtype, count);
    }
  }
}

inline std::shared_ptr<server::HeldKv> MakeHeldKv(const KvShape& shape,
                                                  CapturedQueries queries = {}) {
  KvCache cache = *KvCache::Create(shape, OneThreadBackend());
  FillKv(shape, cache);
  return std::make_shared<server::HeldKv>(std::move(cache), server::ByteReservation(),
                                          std::move(queries));
}

// The same cache in shared memory.
inline std::shared_ptr<server::HeldKv> MakeSharedKv(const KvShape& shape) {
  auto region = *server::SharedRegion::Create(shape.bytes());
  Buffer memory(
      region->bytes().data(), shape.bytes(), [](void*, void*, int64_t) {}, nullptr);
  KvCache cache = *KvCache::CreateIn(shape, std::move(memory));
  FillKv(shape, cache);
  return std::make_shared<server::HeldKv>(std::move(cache), server::ByteReservation(),
                                          CapturedQueries(), std::move(region));
}

}  // namespace pbs::testing_support
