#include "server/model/model.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/model/checkpoint.h"
#include "server/model/file.h"
#include "server/model/folder_hint.h"
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

Status Prefixed(const std::string& prefix, const Status& status) {
  return Status(status.code(), prefix + status.message());
}

StatusOr<ModelConfig> ReadConfig(const std::string& folder, const RopeOptions& rope) {
  const StatusOr<std::string> text =
      ReadTextFile(folder + "/config.json", kConfigBytesMax);
  if (text.status().code() == StatusCode::kNotFound) {
    return NotFound(text.status().message() + FolderHint(folder));
  }
  if (!text.ok()) return text.status();
  StatusOr<ModelConfig> config = ParseModelConfig(*text, rope);
  if (!config.ok()) return Prefixed(folder + "/", config.status());
  const StatusOr<std::string> generation =
      ReadTextFile(folder + "/generation_config.json", kConfigBytesMax);
  if (generation.status().code() == StatusCode::kNotFound) return config;
  if (!generation.ok()) return generation.status();
  const Status status = AddGenerationConfig(*generation, *config);
  if (!status.ok()) return Prefixed(folder + "/", status);
  return config;
}

StatusOr<Checkpoint> OpenCheckpoint(const std::string& folder,
                                    const ModelConfig& config) {
  PBS_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(folder));
  if (!config.is_text_part) return checkpoint;
  const Status status = checkpoint.KeepTextPart();
  if (!status.ok()) return Prefixed(folder + ": ", status);
  return checkpoint;
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
  PBS_ASSIGN_OR_RETURN(ModelConfig config, ReadConfig(folder, options.rope));
  PBS_ASSIGN_OR_RETURN(const Checkpoint checkpoint, OpenCheckpoint(folder, config));
  StatusOr<ModelWeights> weights =
      LoadWeights(checkpoint, config, backend, options.control);
  if (!weights.ok()) return Prefixed(folder + ": ", weights.status());
  PBS_ASSIGN_OR_RETURN(Buffer frequencies, UploadFrequencies(config, backend));
  const DType kv_dtype = options.kv_dtype.value_or(weights->compute_dtype);
  return std::unique_ptr<Model>(new Model(std::move(config), *std::move(weights),
                                          std::move(frequencies), kv_dtype, backend));
}

std::vector<std::string> Model::notes() const {
  std::vector<std::string> notes = config_.notes;
  notes.insert(notes.end(), weights_.notes.begin(), weights_.notes.end());
  return notes;
}

KvShape Model::kv_shape(int32_t capacity) const {
  return {.num_layers = config_.num_layers,
          .num_kv_heads = config_.num_kv_heads,
          .head_dim = config_.head_dim,
          .capacity = capacity,
          .dtype = kv_dtype_};
}

QueryShape Model::query_shape(int32_t num_tokens) const {
  return {config_.num_heads, config_.head_dim, num_tokens, kv_dtype_};
}

}  // namespace pbs
