// Decoding on a cache, one token at a time, with dense attention. Each step is a
// prefill of one token after the cached ones.
//
// Threading: one caller at a time, as the backend. Memory: one workspace for the
// cache's capacity, allocated by Create().
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pbs/backend.h"
#include "pbs/status.h"
#include "server/model/kv_cache.h"
#include "server/model/model.h"

namespace pbs {

class Decoder {
 public:
  // Continues `cache`, which holds the keys and values of cache.num_tokens() tokens.
  // Model and cache must outlive the decoder. ResourceExhausted when there is not
  // enough memory.
  static StatusOr<std::unique_ptr<Decoder>> Create(const Model& model, KvCache& cache);

  // Appends `token` to the cache and returns the logits of the token after it,
  // [vocab_size], valid until the next call. InvalidArgument when the cache or the
  // model's positions are full, or the token is out of range; the cache is then
  // unchanged.
  StatusOr<std::span<const float>> Step(int32_t token);

 private:
  Decoder(const Model& model, KvCache& cache);

  const Model& model_;
  KvCache& cache_;
  Buffer workspace_;
  std::vector<float> logits_;
};

}  // namespace pbs
