// Device memory and packed inputs for the programs of this folder.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace pbs::gpu {

inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

// 256-byte aligned; one byte at least.
class DeviceBytes {
 public:
  explicit DeviceBytes(int64_t bytes) : bytes_(bytes) {
    Check(cudaMalloc(&data_, static_cast<size_t>(bytes > 0 ? bytes : 1)), "cudaMalloc");
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  ~DeviceBytes() { cudaFree(data_); }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

template <class T>
class DeviceVector : public DeviceBytes {
 public:
  explicit DeviceVector(int64_t count)
      : DeviceBytes(count * static_cast<int64_t>(sizeof(T))), count_(count) {}
  explicit DeviceVector(const std::vector<T>& values)
      : DeviceVector(static_cast<int64_t>(values.size())) {
    Check(cudaMemcpy(data(), values.data(), static_cast<size_t>(bytes()),
                     cudaMemcpyHostToDevice),
          "upload");
  }

  std::vector<T> Download() const {
    std::vector<T> values(static_cast<size_t>(count_));
    Check(cudaMemcpy(values.data(), data(), static_cast<size_t>(bytes()),
                     cudaMemcpyDeviceToHost),
          "download");
    return values;
  }

 private:
  int64_t count_;
};

}  // namespace pbs::gpu
