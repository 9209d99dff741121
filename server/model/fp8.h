// Weights stored as FP8 (E4M3, no infinities) with scales, and their values.
//
// A weight "X.weight" [rows, cols] of dtype F8_E4M3 has its scales beside it, as
// "X.weight_scale_inv" or "X.weight_scale" (f32, f16 or bf16): one for all, one per row
// ([rows] or [rows, 1]), or one per block of the format. A value is the byte's number
// times its scale, rounded to bf16, which equals the dequantised weight of
// transformers. The quantisation of activations in a decode tier is not part of the
// weights.
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

#include "pbs/e4m3.h"
#include "pbs/status.h"
#include "server/model/json.h"
#include "server/model/safetensors.h"

namespace pbs {

inline constexpr std::string_view kFp8DTypeName = "F8_E4M3";
inline constexpr int32_t kFp8BlockMax = 65'536;

struct Fp8Format {
  // Size of the block under one scale; 0 when the config states no blocks.
  int32_t block_rows = 0;
  int32_t block_cols = 0;
};

// Parses `quantization_config` of config.json. When the method is not FP8,
// Unimplemented names it and gives advice; InvalidArgument names a key with a wrong
// value.
StatusOr<Fp8Format> ParseQuantization(const JsonObject& quantization);

// The number that an E4M3 byte stands for; NaN for 0x7F and 0xFF.
inline float Fp8ToFloat(uint8_t bits) { return E4m3ToFloat(bits); }

inline bool IsFp8(const TensorInfo& tensor) {
  return tensor.dtype_name == kFp8DTypeName;
}

// Names under which the scales of a weight may be stored.
std::vector<std::string> Fp8ScaleNames(std::string_view weight);

// True for tensors that quantised folders store beside weights and that are needed only
// to quantise activations or caches.
bool IsActivationScale(std::string_view name);

struct ScaleGrid {
  int64_t rows = 0;  // rows of the weight under one scale
  int64_t cols = 0;
};
// InvalidArgument names both tensors when the scale's shape fits none of the layouts.
StatusOr<ScaleGrid> ScaleGridOf(const TensorInfo& weight, const TensorInfo& scale,
                                const Fp8Format& format);

}  // namespace pbs
