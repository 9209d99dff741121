// The kernels of Hopper's attention (sm90_config.h): the default ones, and variants
// that programs in tests/gpu compare with them.
#pragma once

#include "cuda/attention/attention_variant.h"
#include "cuda/attention/sm90_config.h"

namespace pbs::cuda {

// docs/KERNELS.md, "Hopper", has the arithmetic of each choice.
constexpr Sm90Options Sm90OptionsOf(int head_dim, AttentionVariant variant) {
  Sm90Options options{.stages = head_dim == 64 ? 3 : 2};
  switch (variant) {
    case AttentionVariant::kValuesFirst:
      options.keys_first = false;
      break;
    case AttentionVariant::kMoreStages:
      ++options.stages;
      // Three stages of head dim 128 leave too little shared memory for a second buffer
      // of queries.
      if (head_dim == 128) options.query_buffers = 1;
      break;
    case AttentionVariant::kDirectOutputs:
      options.query_buffers = 1;
      break;
    case AttentionVariant::kCacheHints:
      options.cache_hints = true;
      break;
    case AttentionVariant::kWithoutTurns:
      options.takes_turns = false;
      break;
    case AttentionVariant::kWideTiles:
      options.rows = kWideTileRows;
      break;
    default:
      break;
  }
  return options;
}

// Calls body.operator()<options>() for a variant; false when it has no kernel. `kAll`:
// the build has all variants, not only the default.
template <int kHeadDim, bool kAll, class Body>
bool ForSm90Variant(AttentionVariant variant, Body&& body) {
  using enum AttentionVariant;
  const auto run = [&]<AttentionVariant kVariant>() {
    body.template operator()<Sm90OptionsOf(kHeadDim, kVariant)>();
    return true;
  };
  switch (variant) {
    case kChosen:
    case kOneSection:
    case kWithoutOverlap:
      return run.template operator()<kChosen>();
    case kAmpere:
      return false;
    default:
      break;
  }
  if constexpr (kAll) {
    switch (variant) {
      case kValuesFirst:
        return run.template operator()<kValuesFirst>();
      case kMoreStages:
        return run.template operator()<kMoreStages>();
      case kDirectOutputs:
        return run.template operator()<kDirectOutputs>();
      case kCacheHints:
        return run.template operator()<kCacheHints>();
      case kWithoutTurns:
        return run.template operator()<kWithoutTurns>();
      default:
        break;
    }
    if constexpr (kHeadDim == 64) return run.template operator()<kWideTiles>();
  }
  return false;
}

}  // namespace pbs::cuda
