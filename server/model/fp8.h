// Weights stored as FP8 (E4M3, no infinities) with scales, and what they are worth.
//
// A weight "X.weight" [rows, cols] of dtype F8_E4M3 has its scales beside it, as
// "X.weight_scale_inv" or "X.weight_scale" (f32, f16 or bf16): one for all, one per row
// ([rows] or [rows, 1]), or one per block of the format. A value is the byte's number
// times its scale, rounded to bf16: what transformers computes with when it is asked to
// dequantise. How a decode tier quantises activations is no part of the weights.
//
// Threading: pure functions. Sources of the layouts: config.json files of
// llm-compressor (compressed-tensors), Qwen3-FP8, DeepSeek, fbgemm and ModelOpt
// folders.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "pbs/dtype.h"
#include "pbs/status.h"
#include "server/model/json.h"
#include "server/model/safetensors.h"

namespace pbs {

inline constexpr std::string_view kFp8DTypeName = "F8_E4M3";
inline constexpr int32_t kFp8BlockMax = 65'536;

struct Fp8Format {
  // Of one scale; 0 where the config speaks of no blocks.
  int32_t block_rows = 0;
  int32_t block_cols = 0;
};

// From `quantization_config` of config.json. Unimplemented names the method and what to
// do when it is not FP8; InvalidArgument names a key with a wrong value.
StatusOr<Fp8Format> ParseQuantization(const JsonObject& quantization);

// The number that an E4M3 byte stands for; NaN for 0x7F and 0xFF.
float Fp8ToFloat(uint8_t bits);

inline bool IsFp8(const TensorInfo& tensor) {
  return tensor.dtype_name == kFp8DTypeName;
}

// Names under which the scales of a weight may be stored.
std::vector<std::string> Fp8ScaleNames(std::string_view weight);

// True for tensors that quantised folders store beside weights and that only who
// quantises activations or caches reads.
bool IsActivationScale(std::string_view name);

struct ScaleGrid {
  int64_t rows = 0;  // of the weight under one scale
  int64_t cols = 0;
};
// InvalidArgument names both tensors when the scale's shape fits none of the layouts.
StatusOr<ScaleGrid> ScaleGridOf(const TensorInfo& weight, const TensorInfo& scale,
                                const Fp8Format& format);

}  // namespace pbs
