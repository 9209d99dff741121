#include "pbs/dtype.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace pbs {

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
  }
  return "unknown";
}

StatusOr<DType> ParseDType(std::string_view name) {
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return InvalidArgument("dtype \"" + std::string(name) +
                         "\" is not one of f32, f16, bf16");
}

void ConvertElements(const void* source, DType source_dtype, void* target,
                     DType target_dtype, int64_t count) {
  if (source_dtype == target_dtype) {
    if (source != target) {
      std::memcpy(target, source,
                  static_cast<size_t>(count * DTypeBytes(source_dtype)));
    }
    return;
  }
  VisitDType(source_dtype, [&](auto from) {
    VisitDType(target_dtype, [&](auto to) {
      const auto* in = static_cast<const decltype(from)*>(source);
      auto* out = static_cast<decltype(to)*>(target);
      for (int64_t i = 0; i < count; ++i) {
        out[i] = FromFloat<decltype(to)>(ToFloat(in[i]));
      }
    });
  });
}

}  // namespace pbs
