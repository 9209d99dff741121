#include "server/engine/device_tensors.h"

#include <utility>

#include "server/base/status.h"

namespace pbs::server {
namespace {

// Takes buffers and remembers them.
class Placer {
 public:
  Placer(Backend& backend, std::vector<Buffer>& buffers)
      : backend_(backend), buffers_(buffers) {}

  // Null for null.
  template <class T>
  absl::StatusOr<T*> Copy(const T* source, int64_t bytes) {
    if (source == nullptr) return nullptr;
    PBS_ABSL_ASSIGN_OR_RETURN(void* place, Room(bytes));
    PBS_ABSL_RETURN_IF_ERROR(ToAbsl(backend_.Upload(source, place, bytes)));
    return static_cast<T*>(place);
  }
  absl::StatusOr<void*> Room(int64_t bytes) {
    PBS_ABSL_ASSIGN_OR_RETURN(Buffer buffer, ToAbsl(backend_.Allocate(bytes)));
    buffers_.push_back(std::move(buffer));
    return buffers_.back().data();
  }

 private:
  Backend& backend_;
  std::vector<Buffer>& buffers_;
};

}  // namespace

absl::StatusOr<DeviceTensors> DeviceTensors::Upload(const AttentionPlan& plan,
                                                    const AttentionTensors& host,
                                                    Backend& backend) {
  const AttentionGeometry& g = plan.geometry;
  const int64_t row = g.head_dim * DTypeBytes(plan.problem.dtype);
  const int64_t q_bytes = g.num_heads * g.total_q * row;
  const int64_t kv_bytes = g.num_kv_heads * g.total_k * row;
  DeviceTensors device;
  device.tensors_ = host;
  AttentionTensors& t = device.tensors_;
  Placer placer(backend, device.buffers_);
  PBS_ABSL_ASSIGN_OR_RETURN(t.q.data, placer.Copy(host.q.data, q_bytes));
  PBS_ABSL_ASSIGN_OR_RETURN(t.k.data, placer.Copy(host.k.data, kv_bytes));
  PBS_ABSL_ASSIGN_OR_RETURN(t.v.data, placer.Copy(host.v.data, kv_bytes));
  PBS_ABSL_ASSIGN_OR_RETURN(
      t.order.data, placer.Copy(host.order.data, g.num_order_heads * g.total_k * 4));
  if (host.lists.begin != nullptr) {
    const int64_t rows = host.lists.num_rows;
    const int64_t entries =
        rows == 0 ? 0 : host.lists.begin[rows - 1] + host.lists.count[rows - 1];
    PBS_ABSL_ASSIGN_OR_RETURN(t.lists.begin, placer.Copy(host.lists.begin, rows * 8));
    PBS_ABSL_ASSIGN_OR_RETURN(t.lists.count, placer.Copy(host.lists.count, rows * 2));
    PBS_ABSL_ASSIGN_OR_RETURN(t.lists.indices,
                              placer.Copy(host.lists.indices, entries * 2));
    t.lists.num_masked = nullptr;
  }
  device.bytes_.o = q_bytes;
  PBS_ABSL_ASSIGN_OR_RETURN(t.o.data, placer.Room(q_bytes));
  if (host.lse.data != nullptr) {
    device.bytes_.lse = g.num_heads * g.total_q * 4;
    PBS_ABSL_ASSIGN_OR_RETURN(t.lse.data, placer.Room(device.bytes_.lse));
  }
  return device;
}

absl::Status DeviceTensors::Download(const AttentionTensors& host,
                                     Backend& backend) const {
  PBS_ABSL_RETURN_IF_ERROR(
      ToAbsl(backend.Download(tensors_.o.data, host.o.data, bytes_.o)));
  if (bytes_.lse == 0) return absl::OkStatus();
  return ToAbsl(backend.Download(tensors_.lse.data, host.lse.data, bytes_.lse));
}

}  // namespace pbs::server
