#include "cuda/backend/tensor_maps.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace pbs::cuda {

bool TensorMaps::Get(const MappedOperand& mapped, CUtensorMap* map) {
  const auto end = entries_.begin() + static_cast<std::ptrdiff_t>(num_entries_);
  const auto found = std::find_if(entries_.begin(), end, [&](const Entry& entry) {
    return entry.mapped == mapped;
  });
  if (found != end) {
    *map = found->map;
    return true;
  }
  if (!Make(mapped, map)) return false;
  entries_[next_] = {mapped, *map};
  num_entries_ = std::max(num_entries_, next_ + 1);
  next_ = (next_ + 1) % kEntries;
  return true;
}

// The function is the driver's, found at run time: nothing links to it.
bool TensorMaps::Make(const MappedOperand& mapped, CUtensorMap* map) {
  if (encode_ == nullptr) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return false;
    encode_ = reinterpret_cast<Encode>(function);
  }
  const cuuint64_t sizes[4] = {
      static_cast<cuuint64_t>(mapped.width), static_cast<cuuint64_t>(mapped.rows),
      static_cast<cuuint64_t>(mapped.heads), static_cast<cuuint64_t>(mapped.sequences)};
  const std::array<uint64_t, 3> strides = MapStrides(mapped);
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(mapped.box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode_(map,
                 mapped.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                 4, const_cast<uint16_t*>(mapped.operand.data), sizes, strides.data(),
                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace pbs::cuda
