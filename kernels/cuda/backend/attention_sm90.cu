// The Hopper kernels, one per configuration, and the maps of their operands.
#include "cuda/attention/attention_sm90.h"

#include <algorithm>

#include "cuda/backend/attention_launch.h"
#include "cuda/backend/launcher.h"

namespace pbs::cuda {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    AttendSm90Kernel(const __grid_constant__ AttentionParams params,
                     const __grid_constant__ Sm90Operands operands) {
  AttendSm90<Config>(params, operands);
}

// Of the driver, found at run time: nothing links to it.
using EncodeFunction = decltype(&cuTensorMapEncodeTiled);
EncodeFunction FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeFunction>(function);
}

struct Extent {
  int32_t heads;
  int64_t rows;
  int32_t sequences;
};

// False when the driver refuses the operand.
bool MakeMap(const AttentionLaunch& launch, const RowOperand& operand,
             const Extent& extent, uint32_t box_rows, TensorMap* map) {
  static const EncodeFunction encode = FindEncode();
  if (encode == nullptr) return false;
  const bool packed = operand.strides.packed != 0;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(launch.head_dim),
                               static_cast<cuuint64_t>(extent.rows),
                               static_cast<cuuint64_t>(extent.heads),
                               static_cast<cuuint64_t>(packed ? 1 : extent.sequences)};
  // A dimension of one still needs a stride that the driver accepts.
  const auto bytes = [](int64_t elements, cuuint64_t size) {
    return static_cast<cuuint64_t>(size > 1 ? elements * 2 : 16);
  };
  const cuuint64_t strides[3] = {bytes(operand.strides.row, sizes[1]),
                                 bytes(operand.strides.head, sizes[2]),
                                 bytes(operand.strides.sequence, sizes[3])};
  const cuuint32_t box[4] = {64, box_rows, 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode(map,
                launch.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                4, const_cast<uint16_t*>(operand.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class Config>
cudaError_t Launch(const AttentionLaunch& launch, cudaStream_t stream) {
  if (launch.params.num_tiles == 0) return cudaSuccess;
  Sm90Operands operands{};
  const Extent q = {launch.num_heads, launch.q_rows, launch.num_sequences};
  const Extent kv = {launch.num_order_heads, launch.kv_rows, launch.num_sequences};
  operands.q_packed = launch.q.strides.packed;
  operands.kv_packed = launch.k.strides.packed;
  if (launch.k.strides.packed != launch.v.strides.packed ||
      !MakeMap(launch, launch.q, q, 64, &operands.q) ||
      !MakeMap(launch, launch.k, kv, kTileRows, &operands.k) ||
      !MakeMap(launch, launch.v, kv, kTileRows, &operands.v)) {
    return cudaErrorInvalidValue;
  }
  return LaunchKernel(AttendSm90Kernel<Config>,
                      std::min(launch.params.num_tiles, launch.num_multiprocessors),
                      Config::kThreads, sizeof(Sm90Shared<Config>), stream,
                      launch.params, operands);
}

// kStages: what is chosen for the head dim.
template <class Element, int kHeadDim, int kStages>
cudaError_t LaunchTuned(const AttentionLaunch& launch, cudaStream_t stream) {
  switch (launch.variant) {
    case AttentionVariant::kChosen:
    case AttentionVariant::kOneSection:
      return Launch<Sm90Config<Element, kHeadDim, kStages, true>>(launch, stream);
#if defined(PBS_CUDA_VARIANTS)
    case AttentionVariant::kWithoutTurns:
      return Launch<Sm90Config<Element, kHeadDim, kStages, false>>(launch, stream);
    case AttentionVariant::kMoreStages:
      return Launch<Sm90Config<Element, kHeadDim, kStages + 1, true>>(launch, stream);
    case AttentionVariant::kFewerStages:
      if constexpr (kStages > 2) {
        return Launch<Sm90Config<Element, kHeadDim, kStages - 1, true>>(launch, stream);
      }
      break;
#else
    default:
      break;
#endif
  }
  return cudaErrorNotSupported;
}

template <class Element>
cudaError_t LaunchOf(const AttentionLaunch& launch, cudaStream_t stream) {
  switch (launch.head_dim) {
    case 64:
      return LaunchTuned<Element, 64, 3>(launch, stream);
    case 128:
      return LaunchTuned<Element, 128, 2>(launch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LaunchAttentionSm90(const AttentionLaunch& launch, cudaStream_t stream) {
  return launch.bf16 ? LaunchOf<Bf16Element>(launch, stream)
                     : LaunchOf<F16Element>(launch, stream);
}

}  // namespace pbs::cuda
