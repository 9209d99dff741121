#include "server/engine/device_tensors.h"

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "server/base/status.h"

namespace pbs::server {

std::vector<TensorCopy> CopiesOfInputs(const AttentionPlan& plan,
                                       const AttentionTensors& host) {
  const AttentionGeometry& g = plan.geometry;
  const int64_t row = g.head_dim * DTypeBytes(plan.problem.dtype);
  std::vector<TensorCopy> copies;
  const auto add = [&](const void* source, int64_t bytes) {
    if (source != nullptr && bytes > 0) copies.push_back({source, bytes, Buffer()});
  };
  add(host.q.data, g.num_heads * g.total_q * row);
  add(host.k.data, g.num_kv_heads * g.total_k * row);
  add(host.v.data, g.num_kv_heads * g.total_k * row);
  add(host.order.data, g.num_order_heads * g.total_k * 4);
  if (const BlockListsView& lists = host.lists; lists.begin != nullptr) {
    const int64_t rows = lists.num_rows;
    add(lists.begin, rows * 8);
    add(lists.count, rows * 2);
    add(lists.indices,
        rows == 0 ? 0 : (lists.begin[rows - 1] + lists.count[rows - 1]) * 2);
  }
  return copies;
}

absl::StatusOr<DeviceTensors> DeviceTensors::Create(const AttentionPlan& plan,
                                                    const AttentionTensors& host,
                                                    std::span<const TensorCopy> inputs,
                                                    Backend& backend) {
  const AttentionGeometry& g = plan.geometry;
  const auto copy_of = [&]<class T>(const T* source) -> const T* {
    const auto copy = std::ranges::find(inputs, source, &TensorCopy::source);
    return copy == inputs.end() ? nullptr : static_cast<const T*>(copy->target.data());
  };
  DeviceTensors device;
  device.tensors_ = host;
  AttentionTensors& t = device.tensors_;
  t.q.data = copy_of(host.q.data);
  t.k.data = copy_of(host.k.data);
  t.v.data = copy_of(host.v.data);
  t.order.data = copy_of(host.order.data);
  t.lists.begin = copy_of(host.lists.begin);
  t.lists.count = copy_of(host.lists.count);
  t.lists.indices = copy_of(host.lists.indices);
  t.lists.num_masked = nullptr;
  const int64_t rows = g.num_heads * g.total_q;
  PBS_ABSL_ASSIGN_OR_RETURN(
      device.o_,
      ToAbsl(backend.Allocate(rows * g.head_dim * DTypeBytes(plan.problem.dtype))));
  t.o.data = device.o_.data();
  if (host.lse.data != nullptr) {
    PBS_ABSL_ASSIGN_OR_RETURN(device.lse_, ToAbsl(backend.Allocate(rows * 4)));
    t.lse.data = device.lse_.data();
  }
  return device;
}

absl::Status DeviceTensors::Download(const AttentionTensors& host,
                                     Backend& backend) const {
  PBS_ABSL_RETURN_IF_ERROR(
      ToAbsl(backend.Download(o_.data(), host.o.data, o_.bytes())));
  if (lse_.bytes() == 0) return absl::OkStatus();
  return ToAbsl(backend.Download(lse_.data(), host.lse.data, lse_.bytes()));
}

}  // namespace pbs::server
