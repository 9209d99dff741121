#include "server/model/model.h"

#include <utility>
#include <vector>

#include "server/model/checkpoint.h"
#include "server/model/file.h"
#include "server/model/rope.h"

namespace pbs {

namespace {

StatusOr<Buffer> UploadFrequencies(const ModelConfig& config, Backend& backend) {
  const std::vector<double> values = InverseFrequencies(config.rope, config.head_dim);
  const auto bytes = static_cast<int64_t>(values.size() * sizeof(double));
  PBS_ASSIGN_OR_RETURN(Buffer buffer, backend.Allocate(bytes));
  PBS_RETURN_IF_ERROR(backend.Upload(values.data(), buffer.data(), bytes));
  return buffer;
}

}  // namespace

Model::Model(ModelConfig config, ModelWeights weights, Buffer frequencies,
             DType kv_dtype, Backend& backend)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      kv_dtype_(kv_dtype),
      frequencies_(std::move(frequencies)),
      backend_(backend) {}

StatusOr<std::unique_ptr<Model>> Model::Load(const std::string& folder,
                                             const ModelOptions& options,
                                             Backend& backend) {
  PBS_ASSIGN_OR_RETURN(const std::string text,
                       ReadTextFile(folder + "/config.json", kConfigBytesMax));
  StatusOr<ModelConfig> config = ParseModelConfig(text);
  if (!config.ok()) {
    return Status(config.status().code(), folder + "/" + config.status().message());
  }
  PBS_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(folder));
  StatusOr<ModelWeights> weights =
      LoadWeights(checkpoint, *config, backend, options.control);
  if (!weights.ok()) {
    return Status(weights.status().code(), folder + ": " + weights.status().message());
  }
  PBS_ASSIGN_OR_RETURN(Buffer frequencies, UploadFrequencies(*config, backend));
  const DType kv_dtype = options.kv_dtype.value_or(weights->compute_dtype);
  return std::unique_ptr<Model>(new Model(*std::move(config), *std::move(weights),
                                          std::move(frequencies), kv_dtype, backend));
}

KvShape Model::kv_shape(int32_t capacity) const {
  return {.num_layers = config_.num_layers,
          .num_kv_heads = config_.num_kv_heads,
          .head_dim = config_.head_dim,
          .capacity = capacity,
          .dtype = kv_dtype_};
}

}  // namespace pbs
