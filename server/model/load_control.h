// Progress and cancellation of loading a model.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace pbs {

struct LoadControl {
  // Called repeatedly with the tensor bytes read so far and in total.
  std::function<void(int64_t done, int64_t total)> progress = {};
  // When set and true, loading stops with Cancelled.
  const std::atomic<bool>* stop = nullptr;
};

}  // namespace pbs
