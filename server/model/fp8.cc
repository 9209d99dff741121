#include "server/model/fp8.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace pbs {
namespace {

constexpr const char* kWhatToDo =
    "; serve a folder with plain or FP8 (e4m3) weights of this model";

Status Unsupported(const JsonObject& object, const std::string& message) {
  return Unimplemented(object.Error(message + kWhatToDo).message());
}

Status ReadBlocks(const JsonObject& object, std::string_view key, Fp8Format& format) {
  if (!object.Has(key)) return OkStatus();
  PBS_ASSIGN_OR_RETURN(const nlohmann::json* blocks, object.Array(key));
  const auto is_size = [](const nlohmann::json& value) {
    return value.is_number_unsigned() && value.get<uint64_t>() >= 1 &&
           value.get<uint64_t>() <= kFp8BlockMax;
  };
  if (blocks->size() != 2 || !std::all_of(blocks->begin(), blocks->end(), is_size)) {
    return object.Error(std::string(key) + " " + blocks->dump() +
                        " is not two sizes in [1, " + std::to_string(kFp8BlockMax) +
                        "]");
  }
  const Fp8Format found = {(*blocks)[0].get<int32_t>(), (*blocks)[1].get<int32_t>()};
  if (format.block_rows != 0 && (format.block_rows != found.block_rows ||
                                 format.block_cols != found.block_cols)) {
    return Unsupported(object, std::string(key) + " differs between groups");
  }
  format = found;
  return OkStatus();
}

// llm-compressor: groups of layers, each with a scheme of its own.
Status ParseGroup(const JsonObject& group, Fp8Format& format) {
  PBS_ASSIGN_OR_RETURN(const JsonObject weights, group.Object("weights"));
  PBS_ASSIGN_OR_RETURN(const std::string type, weights.String("type"));
  PBS_ASSIGN_OR_RETURN(const int64_t bits, weights.Int("num_bits", 1, 64));
  if (type != "float" || bits != 8) {
    return Unsupported(weights, "type " + Quoted(type) + " of " + std::to_string(bits) +
                                    " bits is not supported");
  }
  PBS_ASSIGN_OR_RETURN(const bool symmetric, weights.BoolOr("symmetric", true));
  if (!symmetric) return Unsupported(weights, "symmetric false is not supported");
  PBS_ASSIGN_OR_RETURN(const std::string strategy, weights.String("strategy"));
  if (strategy != "tensor" && strategy != "channel" && strategy != "block") {
    return Unsupported(weights, "strategy " + Quoted(strategy) +
                                    " is not one of tensor, channel, block");
  }
  return strategy == "block" ? ReadBlocks(weights, "block_structure", format)
                             : OkStatus();
}

StatusOr<Fp8Format> ParseCompressedTensors(const JsonObject& quantization) {
  if (quantization.Has("format")) {
    PBS_ASSIGN_OR_RETURN(const std::string format, quantization.String("format"));
    if (format != "float-quantized" && format != "naive-quantized") {
      return Unsupported(quantization, "format " + Quoted(format) +
                                           " is not supported, only float-quantized");
    }
  }
  for (const char* key : {"sparsity_config", "transform_config"}) {
    if (!quantization.Has(key)) continue;
    PBS_ASSIGN_OR_RETURN(const JsonObject object, quantization.Object(key));
    if (!object.json().empty() && object.json().value("format", "") != "dense") {
      return Unsupported(quantization, std::string(key) + " is not supported");
    }
  }
  PBS_ASSIGN_OR_RETURN(const JsonObject groups, quantization.Object("config_groups"));
  if (groups.json().empty()) return groups.Error("has no groups");
  Fp8Format format;
  for (const auto& [name, value] : groups.json().items()) {
    PBS_ASSIGN_OR_RETURN(const JsonObject group, groups.Object(name));
    PBS_RETURN_IF_ERROR(ParseGroup(group, format));
  }
  return format;
}

}  // namespace

StatusOr<Fp8Format> ParseQuantization(const JsonObject& quantization) {
  PBS_ASSIGN_OR_RETURN(const std::string method, quantization.String("quant_method"));
  if (method == "compressed-tensors") return ParseCompressedTensors(quantization);
  Fp8Format format;
  if (method == "fp8") {
    if (quantization.Has("fmt")) {
      PBS_ASSIGN_OR_RETURN(const std::string kind, quantization.String("fmt"));
      if (kind != "e4m3" && kind != "float8_e4m3fn") {
        return Unsupported(quantization,
                           "fmt " + Quoted(kind) + " is not supported, only e4m3");
      }
    }
    PBS_RETURN_IF_ERROR(ReadBlocks(quantization, "weight_block_size", format));
    return format;
  }
  if (method == "fbgemm_fp8") return format;
  if (method == "modelopt") {
    PBS_ASSIGN_OR_RETURN(const std::string kind, quantization.String("quant_algo"));
    if (kind == "FP8") return format;
    return Unsupported(quantization,
                       "quant_algo " + Quoted(kind) + " is not supported, only FP8");
  }
  return Unsupported(quantization, "quant_method " + Quoted(method) +
                                       " is not supported: its weights are not FP8");
}

std::vector<std::string> Fp8ScaleNames(std::string_view weight) {
  const std::string name(weight);
  return {name + "_scale_inv", name + "_scale"};
}

bool IsActivationScale(std::string_view name) {
  constexpr std::array<std::string_view, 10> kSuffixes = {
      ".input_scale", ".input_scale_ub",    ".activation_scale", ".output_scale",
      ".k_scale",     ".v_scale",           ".q_scale",          ".kv_scale",
      ".prob_scale",  ".input_global_scale"};
  return std::any_of(kSuffixes.begin(), kSuffixes.end(),
                     [&](std::string_view suffix) { return name.ends_with(suffix); });
}

StatusOr<ScaleGrid> ScaleGridOf(const TensorInfo& weight, const TensorInfo& scale,
                                const Fp8Format& format) {
  const int64_t rows = weight.shape[0];
  const int64_t cols = weight.shape[1];
  const std::vector<int64_t>& shape = scale.shape;
  const bool one =
      std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size == 1; });
  if (one) return ScaleGrid{rows, cols};
  if (shape == std::vector{rows} || shape == std::vector<int64_t>{rows, 1}) {
    return ScaleGrid{1, cols};
  }
  std::string expected = "[1], [" + std::to_string(rows) + "] or " +
                         ShapeText(std::array<int64_t, 2>{rows, 1});
  if (format.block_rows > 0) {
    const int64_t down = (rows + format.block_rows - 1) / format.block_rows;
    const int64_t across = (cols + format.block_cols - 1) / format.block_cols;
    if (shape == std::vector{down, across}) {
      return ScaleGrid{format.block_rows, format.block_cols};
    }
    expected += " or, for blocks of " + std::to_string(format.block_rows) + " x " +
                std::to_string(format.block_cols) + ", " +
                ShapeText(std::array<int64_t, 2>{down, across});
  }
  return InvalidArgument("tensor " + Quoted(scale.name) + " has shape " +
                         ShapeText(shape) + "; the scales of " + Quoted(weight.name) +
                         " " + ShapeText(weight.shape) + " have shape " + expected);
}

}  // namespace pbs
