#include "server/backend/memory_budget.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <system_error>

#include "server/base/process.h"

namespace pbs::server {

int64_t MemoryBudget(const ServerSettings& settings) {
  constexpr double kShareOfRest = 0.8;
  if (settings.memory_bytes_max > 0) return settings.memory_bytes_max;
  const int64_t limit = MemoryLimitBytes();
  int64_t files = 0;
  for (const ModelSettings& model : settings.models) {
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(model.path, ignored)) {
      if (entry.path().extension() != ".safetensors") continue;
      const auto size = entry.file_size(ignored);
      if (!ignored) files += static_cast<int64_t>(size);
    }
  }
  const auto rest = static_cast<int64_t>(
      kShareOfRest * static_cast<double>(std::max<int64_t>(0, limit - files)));
  return std::min(limit / 2, rest);
}

int64_t DeviceBudget(const CudaSettings& settings, const Backend& backend) {
  constexpr double kShareOfFree = 0.9;
  if (settings.memory_bytes_max > 0) return settings.memory_bytes_max;
  return static_cast<int64_t>(kShareOfFree *
                              static_cast<double>(backend.info().device_bytes_free));
}

}  // namespace pbs::server
