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

// A tensor in host memory, and where it goes.
struct TensorCopy {
  const void* source = nullptr;
  int64_t bytes = 0;  // > 0
  Buffer target;      // empty until it was allocated
};

// The inputs in `host`, whose tensors have no gaps; targets are empty.
std::vector<TensorCopy> CopiesOfInputs(const AttentionPlan& plan,
                                       const AttentionTensors& host);

class DeviceTensors {
 public:
  // `inputs` as CopiesOfInputs() made them of `host`, uploaded; they must outlive this.
  // Makes room for outputs; layouts as on the host.
  static absl::StatusOr<DeviceTensors> Create(const AttentionPlan& plan,
                                              const AttentionTensors& host,
                                              std::span<const TensorCopy> inputs,
                                              Backend& backend);

  const AttentionTensors& tensors() const { return tensors_; }
  // Waits; o, and lse if it was asked for, are then in `host`.
  absl::Status Download(const AttentionTensors& host, Backend& backend) const;

 private:
  AttentionTensors tensors_;
  Buffer o_, lse_;
};

}  // namespace pbs::server
