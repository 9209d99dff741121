// How whoever loads a model follows it and stops it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace pbs {

struct LoadControl {
  // Called from time to time with tensor bytes read so far and in all.
  std::function<void(int64_t done, int64_t total)> progress = {};
  // When set and true, loading stops with Cancelled.
  const std::atomic<bool>* stop = nullptr;
};

}  // namespace pbs
