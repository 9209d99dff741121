// A model's weights on a backend, read from a checkpoint.
//
// Before any tensor data is read, the checkpoint is compared with the config. Every
// tensor that the model needs must exist with its shape and a supported dtype (for
// linear layers also FP8 with scales, fp8.h). Other tensors are refused, unless they
// are known to have no effect (weights.cc). Elements must be finite.
//
// Threading: immutable after Load(). Memory: linear layers and the embedding keep their
// stored dtype, FP8 becomes bf16; norms and biases become f32. Loading needs a few MiB
// beyond that.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pbs/backend.h"
#include "pbs/status.h"
#include "server/model/checkpoint.h"
#include "server/model/load_control.h"
#include "server/model/model_config.h"

namespace pbs {

struct LayerWeights {
  std::unique_ptr<PackedLinear> qkv;      // hidden -> queries, keys, values
  std::unique_ptr<PackedLinear> output;   // adds to the residual
  std::unique_ptr<PackedLinear> gate_up;  // hidden -> silu(gate) * up
  std::unique_ptr<PackedLinear> down;     // adds to the residual
  // Device pointers into ModelWeights::norms.
  const float* attention_norm = nullptr;  // [hidden]
  const float* mlp_norm = nullptr;        // [hidden]
  const float* q_norm = nullptr;          // [head_dim] or null
  const float* k_norm = nullptr;          // [head_dim] or null
};

struct ModelWeights {
  // dtype of all activations (Backend::ComputeDType).
  DType compute_dtype = DType::kF32;
  Buffer embedding;  // [vocab, hidden]
  DType embedding_dtype = DType::kF32;
  Buffer head;  // [vocab, hidden]; empty when tied to the embedding
  DType head_dtype = DType::kF32;
  Buffer norms;
  const float* final_norm = nullptr;  // [hidden]
  std::vector<LayerWeights> layers;
  int64_t bytes = 0;               // device memory of all weights
  std::string digest;              // digest.h
  std::vector<std::string> notes;  // peculiarities of the checkpoint, in sentences

  const void* head_data() const {
    return head.bytes() > 0 ? head.data() : embedding.data();
  }
};

// InvalidArgument names the tensor, its properties and the ones that the config
// requires. DataLoss when a file shrinks while it is read. Errors of the backend are
// passed on.
StatusOr<ModelWeights> LoadWeights(const Checkpoint& checkpoint,
                                   const ModelConfig& config, Backend& backend,
                                   const LoadControl& control);

}  // namespace pbs
