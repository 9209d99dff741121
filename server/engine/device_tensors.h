// The tensors of a raw attention on a device with memory of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "pbs/backend.h"

namespace pbs::server {

class DeviceTensors {
 public:
  // Copies of inputs, room for outputs; layouts as on the host, whose tensors have no
  // gaps.
  static absl::StatusOr<DeviceTensors> Upload(const AttentionPlan& plan,
                                              const AttentionTensors& host,
                                              Backend& backend);

  const AttentionTensors& tensors() const { return tensors_; }
  // Waits; o, and lse if it was asked for, are then in `host`.
  absl::Status Download(const AttentionTensors& host, Backend& backend) const;

 private:
  struct Sizes {
    int64_t o = 0;
    int64_t lse = 0;
  };

  AttentionTensors tensors_;
  Sizes bytes_;
  std::vector<Buffer> buffers_;
};

}  // namespace pbs::server
