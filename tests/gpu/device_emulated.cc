#include <cstdlib>

#include "emulator/emulated_driver.h"
#include "tests/gpu/session.h"

namespace pbs::gpu {

StatusOr<Device> OpenDevice(cuda::AttentionVariant variant, std::optional<void*>) {
  return Device{std::make_unique<emulator::EmulatedDriver>(
                    emulator::EmulatedOptions{.attention = variant}),
                nullptr, variant};
}

Status RunCaptured(const Device&, const std::function<Status()>& enqueue) {
  return enqueue();
}

std::string DescribeHang(const Device&, int32_t) {
  const char* planted = std::getenv("PBS_PLANTED_HANG");
  return planted == nullptr ? "" : planted;
}

void Lend(const void* data, int64_t bytes) {
  if (bytes == 0) return emulator::GlobalMemory::Forbid(data);
  emulator::GlobalMemory::Allow(data, bytes, /*written=*/true);
}

}  // namespace pbs::gpu
