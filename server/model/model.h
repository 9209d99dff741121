// A loaded model: its config, its weights on a backend, its digest.
//
// Threading: immutable after Load(); running it uses the backend, whose rule is one
// caller at a time. Memory: weight_bytes(). The backend must outlive the model.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "pbs/backend.h"
#include "pbs/status.h"
#include "server/model/captured_queries.h"
#include "server/model/kv_cache.h"
#include "server/model/model_config.h"
#include "server/model/weights.h"

namespace pbs {

struct ModelOptions {
  // dtype of the KV cache and of attention. Default: the compute dtype.
  std::optional<DType> kv_dtype = {};
  RopeOptions rope = {};
  LoadControl control = {};
};

class Model {
 public:
  // Reads `folder` (config.json, safetensors and, where there is one,
  // generation_config.json). Errors name the file and the key or tensor in it; see
  // model_config.h, checkpoint.h and weights.h. After an error nothing stays allocated.
  static StatusOr<std::unique_ptr<Model>> Load(const std::string& folder,
                                               const ModelOptions& options,
                                               Backend& backend);

  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return weights_; }
  Backend& backend() const { return backend_; }

  // Facts about reading the folder that an operator should know, in sentences.
  std::vector<std::string> notes() const;
  const std::string& digest() const { return weights_.digest; }
  int64_t weight_bytes() const { return weights_.bytes; }
  DType compute_dtype() const { return weights_.compute_dtype; }
  DType kv_dtype() const { return kv_dtype_; }
  // Shape of a cache for one sequence of up to `capacity` tokens.
  KvShape kv_shape(int32_t capacity) const;
  // Shape of captured queries of one sequence.
  QueryShape query_shape(int32_t num_tokens) const;
  // [head_dim / 2], device memory; see rope.h.
  const double* inverse_frequencies() const {
    return static_cast<const double*>(frequencies_.data());
  }

 private:
  Model(ModelConfig config, ModelWeights weights, Buffer frequencies, DType kv_dtype,
        Backend& backend);

  const ModelConfig config_;
  const ModelWeights weights_;
  const DType kv_dtype_;
  const Buffer frequencies_;
  Backend& backend_;
};

}  // namespace pbs
