// The header of a safetensors file: u64 length (little endian), JSON, tensor bytes.
//
// No file is trusted. This reader refuses every file that the reference reader refuses.
// It also refuses repeated keys, unknown fields, a header that does not start with '{',
// tensors without elements, and headers beyond kSafetensorsHeaderBytesMax. Tensor bytes
// may be misaligned for their dtype; they are copied, never cast.
//
// Threading: pure functions. Memory: O(header).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "pbs/dtype.h"
#include "pbs/status.h"

namespace pbs {

// The reference allows 100 MB; the largest model of the families we serve needs 0.2 MB.
inline constexpr int64_t kSafetensorsHeaderBytesMax = 16 << 20;
inline constexpr int64_t kSafetensorsTensorsMax = 65'536;  // of one file
inline constexpr int64_t kTensorRankMax = 8;
inline constexpr int64_t kTensorNameBytesMax = 512;

struct TensorInfo {
  std::string name;
  std::string dtype_name;      // "BF16"
  std::optional<DType> dtype;  // nullopt when we cannot compute with it
  std::vector<int64_t> shape;  // every dimension >= 1; [] is one element
  int64_t begin = 0;           // offset in the file, bytes
  int64_t bytes = 0;
};

// "[128, 64]"
std::string ShapeText(std::span<const int64_t> shape);

// Header length from a file's first 8 bytes. InvalidArgument when it exceeds the limit
// or the file.
StatusOr<int64_t> ParseSafetensorsLength(std::span<const uint8_t> first8,
                                         int64_t file_bytes);

// The tensors of a file of `file_bytes` bytes whose JSON header is `header`, sorted by
// name. InvalidArgument names the tensor, the field and what is wrong.
StatusOr<std::vector<TensorInfo>> ParseSafetensorsHeader(std::string_view header,
                                                         int64_t file_bytes);

}  // namespace pbs
