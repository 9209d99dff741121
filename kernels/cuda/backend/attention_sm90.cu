// The Hopper kernels, one per configuration, and the maps of their operands.
#include "cuda/attention/attention_sm90.h"

#include <algorithm>
#include <cstddef>
#include <string>

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

StatusOr<const HangRecord*> WatchHangs() {
#if defined(PBS_BOUNDED_WAITS)
  HangRecord* record = nullptr;
  cudaError_t error = cudaHostAlloc(&record, sizeof(*record), cudaHostAllocMapped);
  if (error == cudaSuccess) {
    *record = {};
    error = cudaMemcpyToSymbol(hang_record, &record, sizeof(record));
  }
  if (error == cudaSuccess) return const_cast<const HangRecord*>(record);
  return Internal(std::string("watching for hangs: ") + cudaGetErrorString(error));
#else
  return Unimplemented("this build waits without bounds");
#endif
}

std::string NameBarrier(int32_t head_dim, int32_t barrier) {
  const auto name_in = [&]<int kHeadDim>() {
    using Shared =
        Sm90Shared<Sm90Config<Bf16Element, kHeadDim,
                              Sm90OptionsOf(kHeadDim, AttentionVariant::kChosen)>>;
    const struct {
      const char* name;
      size_t begin;
      size_t bytes;
    } all[] = {{"q_full", offsetof(Shared, q_full), sizeof(Shared::q_full)},
               {"q_empty", offsetof(Shared, q_empty), sizeof(Shared::q_empty)},
               {"k_full", offsetof(Shared, k_full), sizeof(Shared::k_full)},
               {"k_empty", offsetof(Shared, k_empty), sizeof(Shared::k_empty)},
               {"v_full", offsetof(Shared, v_full), sizeof(Shared::v_full)},
               {"v_empty", offsetof(Shared, v_empty), sizeof(Shared::v_empty)},
               {"tile_full", offsetof(Shared, tile_full), sizeof(Shared::tile_full)}};
    const auto at = static_cast<size_t>(barrier);
    for (const auto& [name, begin, bytes] : all) {
      if (at < begin || at >= begin + bytes) continue;
      const size_t index = (at - begin) / sizeof(Mbarrier);
      return std::string(name) + "[" + std::to_string(index) + "]";
    }
    return "offset " + std::to_string(barrier);
  };
  return head_dim == 64 ? name_in.operator()<64>() : name_in.operator()<128>();
}

}  // namespace pbs::cuda
