// Whole safetensors files for tests, read with the loader's own header checks.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "pbs/check.h"
#include "server/model/file.h"
#include "server/model/safetensors.h"

namespace pbs::testing_support {

struct FileTensor {
  std::string dtype;  // "F16"
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;

  int64_t elements() const {
    int64_t count = 1;
    for (int64_t dimension : shape) count *= dimension;
    return count;
  }
  // Integers of any width, widened.
  std::vector<int32_t> Integers() const {
    std::vector<int32_t> values(static_cast<size_t>(elements()));
    const size_t width = bytes.size() / values.size();
    for (size_t i = 0; i < values.size(); ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, bytes.data() + i * width, width);
      values[i] = width == 2 ? static_cast<int16_t>(bits) : static_cast<int32_t>(bits);
    }
    return values;
  }
  DType Float() const {
    return dtype == "F32" ? DType::kF32 : dtype == "F16" ? DType::kF16 : DType::kBF16;
  }
  // The tensor's bytes as `target`.
  std::vector<uint8_t> As(DType target) const {
    std::vector<uint8_t> converted(
        static_cast<size_t>(elements() * DTypeBytes(target)));
    ConvertElements(bytes.data(), Float(), converted.data(), target, elements());
    return converted;
  }
  std::vector<float> Floats() const {
    std::vector<float> values(static_cast<size_t>(elements()));
    ConvertElements(bytes.data(), Float(), values.data(), DType::kF32, elements());
    return values;
  }
};

using TensorMap = std::map<std::string, FileTensor>;

// Requires a good file: a test's own data.
inline TensorMap ReadSafetensors(const std::string& path) {
  const auto file = File::Open(path);
  PBS_CHECK(file.ok());
  uint8_t first8[8];
  PBS_CHECK(file->ReadAt(0, 8, first8).ok());
  const auto length = ParseSafetensorsLength(first8, file->size());
  PBS_CHECK(length.ok());
  std::string header(static_cast<size_t>(*length), '\0');
  PBS_CHECK(file->ReadAt(8, *length, header.data()).ok());
  const auto tensors = ParseSafetensorsHeader(header, file->size());
  PBS_CHECK(tensors.ok());
  TensorMap map;
  for (const TensorInfo& info : *tensors) {
    FileTensor tensor = {info.dtype_name, info.shape, {}};
    tensor.bytes.resize(static_cast<size_t>(info.bytes));
    PBS_CHECK(file->ReadAt(info.begin, info.bytes, tensor.bytes.data()).ok());
    map.emplace(info.name, std::move(tensor));
  }
  return map;
}

}  // namespace pbs::testing_support
