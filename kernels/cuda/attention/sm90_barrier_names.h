// Names of the barriers of Hopper's attention, for reports of a hang
// (cuda/backend/hang_watch.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/attention/attention_sm90.h"
#include "cuda/attention/sm90_variants.h"

namespace pbs::cuda {

// Name of the barrier at an offset in the shared memory of a kernel; "" where there is
// no barrier.
template <class Shared>
std::string NameSm90BarrierOf(size_t offset) {
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
  for (const auto& [name, begin, bytes] : all) {
    if (offset < begin || offset >= begin + bytes) continue;
    const size_t index = (offset - begin) / sizeof(Mbarrier);
    return std::string(name) + "[" + std::to_string(index) + "]";
  }
  return "";
}

// Name of the barrier at an offset in a variant's kernel, or "offset N". `kAll`: as in
// ForSm90Variant().
template <bool kAll>
std::string NameSm90Barrier(int32_t head_dim, AttentionVariant variant,
                            int32_t barrier) {
  std::string name;
  const auto look = [&]<int kHeadDim>() {
    ForSm90Variant<kHeadDim, kAll>(variant, [&]<Sm90Options kOptions>() {
      using Shared = Sm90Shared<Sm90Config<Bf16Element, kHeadDim, kOptions>>;
      name = NameSm90BarrierOf<Shared>(static_cast<size_t>(barrier));
    });
  };
  head_dim == 64 ? look.template operator()<64>() : look.template operator()<128>();
  return name.empty() ? "offset " + std::to_string(barrier) : name;
}

}  // namespace pbs::cuda
