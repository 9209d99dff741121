#include "server/model/safetensors.h"

#include <algorithm>
#include <cstring>

#include "server/model/json.h"

namespace pbs {
namespace {

constexpr int64_t kLengthBytes = 8;
constexpr std::string_view kMetadataKey = "__metadata__";

struct StoredType {
  const char* name;
  int64_t bytes;
  std::optional<DType> dtype;
};

constexpr StoredType kStoredTypes[] = {
    {"F32", 4, DType::kF32}, {"F16", 2, DType::kF16}, {"BF16", 2, DType::kBF16},
    {"F64", 8, {}},          {"I64", 8, {}},          {"I32", 4, {}},
    {"I16", 2, {}},          {"I8", 1, {}},           {"U64", 8, {}},
    {"U32", 4, {}},          {"U16", 2, {}},          {"U8", 1, {}},
    {"BOOL", 1, {}},         {"F8_E4M3", 1, {}},      {"F8_E5M2", 1, {}},
};

const StoredType* FindStoredType(std::string_view name) {
  for (const StoredType& type : kStoredTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

// A non-negative integer that fits int64; nothing for anything else.
std::optional<int64_t> NonNegative(const nlohmann::json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const auto number = value.get<uint64_t>();
  if (number > uint64_t{INT64_MAX}) return std::nullopt;
  return static_cast<int64_t>(number);
}

Status CheckMetadata(const nlohmann::json& metadata) {
  if (!metadata.is_object()) return InvalidArgument("__metadata__ is not an object");
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      return InvalidArgument("__metadata__ " + Quoted(key) + " is not a string");
    }
  }
  return OkStatus();
}

// Multiplies out the shape; the result is what the offsets must span.
Status ParseShape(const JsonObject& entry, int64_t element_bytes, TensorInfo& tensor) {
  PBS_ASSIGN_OR_RETURN(const nlohmann::json* shape, entry.Array("shape"));
  if (static_cast<int64_t>(shape->size()) > kTensorRankMax) {
    return entry.Error("shape has " + std::to_string(shape->size()) +
                       " dimensions, more than " + std::to_string(kTensorRankMax));
  }
  tensor.bytes = element_bytes;
  for (const nlohmann::json& dimension : *shape) {
    const auto size = NonNegative(dimension);
    if (!size.has_value() || *size == 0) {
      return entry.Error("shape holds " + Quoted(dimension.dump()) +
                         ", not a positive integer");
    }
    if (__builtin_mul_overflow(tensor.bytes, *size, &tensor.bytes)) {
      return entry.Error("shape " + Quoted(shape->dump()) + " overflows 64 bits");
    }
    tensor.shape.push_back(*size);
  }
  return OkStatus();
}

Status ParseOffsets(const JsonObject& entry, int64_t data_begin, int64_t data_bytes,
                    TensorInfo& tensor) {
  PBS_ASSIGN_OR_RETURN(const nlohmann::json* offsets, entry.Array("data_offsets"));
  const bool pair = offsets->size() == 2;
  const auto begin = pair ? NonNegative((*offsets)[0]) : std::nullopt;
  const auto end = pair ? NonNegative((*offsets)[1]) : std::nullopt;
  if (!begin.has_value() || !end.has_value()) {
    return entry.Error("data_offsets is not a pair of non-negative integers");
  }
  if (*begin > *end || *end > data_bytes) {
    return entry.Error("data_offsets [" + std::to_string(*begin) + ", " +
                       std::to_string(*end) + "] do not lie in the " +
                       std::to_string(data_bytes) + " bytes of data");
  }
  if (*end - *begin != tensor.bytes) {
    return entry.Error("data_offsets span " + std::to_string(*end - *begin) +
                       " bytes; shape " + ShapeText(tensor.shape) + " of " +
                       tensor.dtype_name + " needs " + std::to_string(tensor.bytes));
  }
  tensor.begin = data_begin + *begin;
  return OkStatus();
}

StatusOr<TensorInfo> ParseTensor(const std::string& name, const nlohmann::json& value,
                                 int64_t data_begin, int64_t data_bytes) {
  const std::string where = "tensor " + Quoted(name) + ": ";
  if (name.empty() || static_cast<int64_t>(name.size()) > kTensorNameBytesMax) {
    return InvalidArgument(where + "its name has " + std::to_string(name.size()) +
                           " bytes, outside [1, " +
                           std::to_string(kTensorNameBytesMax) + "]");
  }
  if (!value.is_object()) return InvalidArgument(where + "is not an object");
  const JsonObject entry(value, where);
  for (const auto& [key, unused] : value.items()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      return entry.Error("unknown field " + Quoted(key));
    }
  }
  TensorInfo tensor;
  tensor.name = name;
  PBS_ASSIGN_OR_RETURN(tensor.dtype_name, entry.String("dtype"));
  const StoredType* type = FindStoredType(tensor.dtype_name);
  if (type == nullptr) return entry.Error("unknown dtype " + Quoted(tensor.dtype_name));
  tensor.dtype = type->dtype;
  PBS_RETURN_IF_ERROR(ParseShape(entry, type->bytes, tensor));
  PBS_RETURN_IF_ERROR(ParseOffsets(entry, data_begin, data_bytes, tensor));
  return tensor;
}

// The tensors must tile the data: no overlap, no hole, nothing behind the last.
Status CheckTiling(const std::vector<TensorInfo>& tensors, int64_t data_begin,
                   int64_t file_bytes) {
  std::vector<const TensorInfo*> by_place;
  for (const TensorInfo& tensor : tensors) by_place.push_back(&tensor);
  std::stable_sort(by_place.begin(), by_place.end(),
                   [](const auto* a, const auto* b) { return a->begin < b->begin; });
  int64_t next = data_begin;
  for (const TensorInfo* tensor : by_place) {
    const int64_t gap = tensor->begin - next;
    const std::string where = "tensor " + Quoted(tensor->name) + ": ";
    if (gap < 0) {
      return InvalidArgument(where + "overlaps the one before it by " +
                             std::to_string(-gap) + " bytes");
    }
    if (gap > 0) {
      return InvalidArgument(where + "leaves a hole of " + std::to_string(gap) +
                             " bytes before it");
    }
    next = tensor->begin + tensor->bytes;
  }
  if (next != file_bytes) {
    return InvalidArgument(std::to_string(file_bytes - next) +
                           " bytes after the last tensor belong to no tensor");
  }
  return OkStatus();
}

}  // namespace

std::string ShapeText(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

StatusOr<int64_t> ParseSafetensorsLength(std::span<const uint8_t> first8,
                                         int64_t file_bytes) {
  if (file_bytes < kLengthBytes || static_cast<int64_t>(first8.size()) < kLengthBytes) {
    return InvalidArgument("the file has " + std::to_string(file_bytes) +
                           " bytes, fewer than the 8 of its header's length");
  }
  uint64_t length = 0;
  for (int64_t i = kLengthBytes; i-- > 0;) length = (length << 8) | first8[i];
  if (length > uint64_t{kSafetensorsHeaderBytesMax}) {
    return InvalidArgument("header length " + std::to_string(length) + " exceeds " +
                           std::to_string(kSafetensorsHeaderBytesMax));
  }
  if (static_cast<int64_t>(length) > file_bytes - kLengthBytes) {
    return InvalidArgument("header length " + std::to_string(length) + " exceeds the " +
                           std::to_string(file_bytes - kLengthBytes) +
                           " bytes behind it");
  }
  return static_cast<int64_t>(length);
}

StatusOr<std::vector<TensorInfo>> ParseSafetensorsHeader(std::string_view header,
                                                         int64_t file_bytes) {
  const int64_t data_begin = kLengthBytes + static_cast<int64_t>(header.size());
  if (header.empty() || header[0] != '{') {
    return InvalidArgument("the header does not start with '{'");
  }
  // A tensor has an entry, a dtype, two arrays, offsets and dimensions.
  const JsonLimits limits = {
      .bytes_max = kSafetensorsHeaderBytesMax,
      .depth_max = 3,
      .values_max = kSafetensorsTensorsMax * (6 + kTensorRankMax)};
  PBS_ASSIGN_OR_RETURN(const nlohmann::json root, ParseJson(header, "header", limits));
  std::vector<TensorInfo> tensors;
  for (const auto& [name, value] : root.items()) {
    if (name == kMetadataKey) {
      PBS_RETURN_IF_ERROR(CheckMetadata(value));
      continue;
    }
    if (static_cast<int64_t>(tensors.size()) == kSafetensorsTensorsMax) {
      return InvalidArgument("more than " + std::to_string(kSafetensorsTensorsMax) +
                             " tensors");
    }
    PBS_ASSIGN_OR_RETURN(TensorInfo tensor,
                         ParseTensor(name, value, data_begin, file_bytes - data_begin));
    tensors.push_back(std::move(tensor));
  }
  PBS_RETURN_IF_ERROR(CheckTiling(tensors, data_begin, file_bytes));
  return tensors;
}

}  // namespace pbs
