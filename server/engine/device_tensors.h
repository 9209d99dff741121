// The tensors of a raw attention on a device with memory of its own.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "pbs/backend.h"

namespace pbs::server {

// A tensor in host memory and its copy on the device.
struct TensorCopy {
  const void* source = nullptr;
  int64_t bytes = 0;  // > 0
  Buffer target;      // empty until it is allocated
};

// Copies of the inputs in `host`, whose tensors have no gaps. The targets are empty.
std::vector<TensorCopy> CopiesOfInputs(const AttentionPlan& plan,
                                       const AttentionTensors& host);

class DeviceTensors {
 public:
  // `inputs` are the uploaded CopiesOfInputs() of `host` and must outlive this.
  // Allocates outputs, with the layouts of `host`.
  static absl::StatusOr<DeviceTensors> Create(const AttentionPlan& plan,
                                              const AttentionTensors& host,
                                              std::span<const TensorCopy> inputs,
                                              Backend& backend);

  const AttentionTensors& tensors() const { return tensors_; }
  // Copies o, and lse if it was requested, to `host`, and waits for that.
  absl::Status Download(const AttentionTensors& host, Backend& backend) const;

 private:
  AttentionTensors tensors_;
  Buffer o_, lse_;
};

}  // namespace pbs::server
