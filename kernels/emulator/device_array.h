// Device memory and launches for tests that run kernels on the emulator.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "emulator/machine.h"

namespace pbs::emulator {

// Runs the kernels that the pipeline enqueues, until one faults.
struct EmulatorLauncher {
  uint32_t seed = 1;
  Fault fault;
  int launches = 0;

  template <class Kernel, class Params>
  void Run(int64_t blocks, int64_t shared_bytes, const Params& params) {
    if (blocks == 0 || !fault.ok()) return;
    ++launches;
    fault = Launch({.blocks = static_cast<int>(blocks),
                    .threads = Kernel::kThreads,
                    .resident_blocks = 2,
                    .shared_bytes = shared_bytes,
                    .seed = seed},
                   [&] { Kernel::Run(params); });
  }
};

// 16-byte aligned memory that kernels may touch.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count, bool written = false)
      : data_(static_cast<T*>(
            std::aligned_alloc(256, Rounded(count * static_cast<int64_t>(sizeof(T)))))),
        count_(count),
        written_(written) {
    std::memset(data_.get(), 0xFF, Rounded(bytes()));
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  void Allow() const { GlobalMemory::Allow(data_.get(), bytes(), written_); }

 private:
  static size_t Rounded(int64_t bytes) {
    return static_cast<size_t>((bytes + 256) / 256 * 256);
  }
  struct Free {
    void operator()(T* data) const {
      GlobalMemory::Forbid(data);
      std::free(data);
    }
  };
  std::unique_ptr<T, Free> data_;
  int64_t count_;
  bool written_;
};

}  // namespace pbs::emulator
