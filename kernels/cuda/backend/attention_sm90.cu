// The Hopper kernels, one per configuration, and the maps of their operands.
#include "cuda/attention/attention_sm90.h"

#include <algorithm>
#include <string>

#include "cuda/attention/sm90_barrier_names.h"
#include "cuda/attention/sm90_variants.h"
#include "cuda/backend/attention_launch.h"
#include "cuda/backend/hang_watch.h"

namespace pbs::cuda {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    AttendSm90Kernel(const __grid_constant__ AttentionParams params,
                     const __grid_constant__ Sm90Operands operands) {
  AttendSm90<Config>(params, operands);
}

bool MakeOperands(const AttentionLaunch& launch, TensorMaps& maps,
                  Sm90Operands* operands) {
  const MappedOperands mapped = MapOperands(launch.plan, launch.run);
  operands->q_packed = launch.run.q.strides.packed;
  operands->kv_packed = launch.run.k.strides.packed;
  return launch.run.k.strides.packed == launch.run.v.strides.packed &&
         maps.Get(mapped.q, &operands->q) && maps.Get(mapped.k, &operands->k) &&
         maps.Get(mapped.v, &operands->v) && maps.Get(mapped.o, &operands->o);
}

#if defined(PBS_CUDA_VARIANTS)
constexpr bool kHasVariants = true;
#else
constexpr bool kHasVariants = false;
#endif

template <class Element, int kHeadDim>
void LaunchOf(const AttentionLaunch& launch, const Sm90Operands& operands,
              CudaLauncher& launcher) {
  const AttentionParams& params = launch.run.attention;
  bool launched = false;
  const auto run = [&]<Sm90Options kOptions>() {
    using Config = Sm90Config<Element, kHeadDim, kOptions>;
    if (launch.plan.tile_rows != kOptions.rows) return;
    launcher.Launch(AttendSm90Kernel<Config>,
                    std::min(params.num_tiles, launch.num_multiprocessors),
                    Config::kThreads, sizeof(Sm90Shared<Config>), params, operands);
    launched = true;
  };
  // What is compared is timed in bf16.
  ForSm90Variant<kHeadDim, kHasVariants && Element::kIsBf16>(launch.variant, run);
  if (!launched) launcher.Fail(cudaErrorNotSupported);
}

}  // namespace

void LaunchAttentionSm90(const AttentionLaunch& launch, TensorMaps& maps,
                         CudaLauncher& launcher) {
  if (launch.run.attention.num_tiles == 0) return;
  Sm90Operands operands{};
  if (!MakeOperands(launch, maps, &operands)) {
    return launcher.Fail(cudaErrorInvalidValue);
  }
  const auto run = [&]<class Element>() {
    if (launch.plan.geometry.head_dim == 64) {
      return LaunchOf<Element, 64>(launch, operands, launcher);
    }
    LaunchOf<Element, 128>(launch, operands, launcher);
  };
  if (launch.plan.problem.dtype == DType::kBF16) {
    return run.template operator()<Bf16Element>();
  }
  run.template operator()<F16Element>();
}

#if defined(PBS_BOUNDED_WAITS)
std::string DescribeHang(int32_t head_dim, AttentionVariant variant) {
  static const volatile HangRecord* const watched = [] {
    HangRecord* record = nullptr;
    if (cudaHostAlloc(&record, sizeof(*record), cudaHostAllocMapped) == cudaSuccess) {
      *record = {};
      static_cast<void>(cudaMemcpyToSymbol(hang_record, &record, sizeof(record)));
    }
    return record;
  }();
  if (watched == nullptr || watched->hung == 0) return "";
  return "block " + std::to_string(watched->block) + ", warpgroup " +
         std::to_string(watched->warpgroup) + " waits for " +
         NameSm90Barrier<kHasVariants>(head_dim, variant, watched->barrier) +
         ", parity " + std::to_string(watched->parity) + ", tile " +
         std::to_string(watched->tile);
}
#else
std::string DescribeHang(int32_t, AttentionVariant) { return ""; }
#endif

}  // namespace pbs::cuda
