#include "server/engine/kv_window.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <utility>

#include "pbs/check.h"
#include "server/base/status.h"

namespace pbs::server {

int64_t KvWindow::BytesOf(const KvShape& shape) {
  return 2 * shape.plane_bytes() * std::min(kLayers, shape.num_layers);
}

absl::StatusOr<std::unique_ptr<KvWindow>> KvWindow::Create(
    std::span<const KvCache* const> held, Backend& backend, const Clock& clock) {
  PBS_CHECK(!held.empty());
  KvShape shape = held.front()->shape();
  for (const KvCache* cache : held.subspan(1))
    shape.capacity += cache->shape().capacity;
  PBS_ABSL_ASSIGN_OR_RETURN(KvCache cache,
                            ToAbsl(KvCache::CreateWindow(
                                shape, std::min(kLayers, shape.num_layers), backend)));
  Buffer staging;
  if (held.size() > 1) {
    PBS_ABSL_ASSIGN_OR_RETURN(staging, ToAbsl(backend.AllocateHost(BytesOf(shape))));
  }
  return std::unique_ptr<KvWindow>(
      new KvWindow(held, std::move(cache), std::move(staging), backend, clock));
}

KvWindow::~KvWindow() {
  MutexLock lock(mutex_);
  while (left_ < sent_) changed_.Wait(mutex_);
}

absl::Status KvWindow::MakeRoomFor(int32_t layer) {
  const absl::Time begin = clock_.Now();
  MutexLock lock(mutex_);
  while (left_ < std::min(sent_, layer - kLayers + 1)) changed_.Wait(mutex_);
  wait_seconds_ += absl::ToDoubleSeconds(clock_.Now() - begin);
  return status_;
}

double KvWindow::copy_seconds() const {
  MutexLock lock(mutex_);
  return absl::ToDoubleSeconds(copying_);
}

void KvWindow::Send(int32_t layer, std::function<void()> on_held) {
  PBS_CHECK(layer == sent_);
  ++sent_;
  SendPlane(layer, Plane::kKeys, nullptr);
  SendPlane(layer, Plane::kValues, std::move(on_held));
}

void KvWindow::SendPlane(int32_t layer, Plane plane, std::function<void()> on_held) {
  const void* source = plane == Plane::kKeys ? cache_.k(layer) : cache_.v(layer);
  void* target = nullptr;
  const bool scatters = staging_.bytes() > 0;
  if (scatters) {
    target = StagingPlane(layer, plane);
  } else {
    MutexLock lock(held_mutex_);
    target = plane == Plane::kKeys ? held_.front()->k(layer) : held_.front()->v(layer);
  }
  backend_.DownloadLater(source, target, cache_.shape().plane_bytes(),
                         [this, layer, plane, scatters,
                          on_held = std::move(on_held)](const Status& status) {
                           if (scatters && status.ok()) Scatter(layer, plane);
                           OnCopied(status, on_held);
                         });
}

std::byte* KvWindow::StagingPlane(int32_t layer, Plane plane) const {
  const int64_t index =
      2 * (layer % cache_.resident_layers()) + (plane == Plane::kValues ? 1 : 0);
  return static_cast<std::byte*>(staging_.data()) +
         index * cache_.shape().plane_bytes();
}

void KvWindow::Scatter(int32_t layer, Plane plane) {
  const KvShape& shape = cache_.shape();
  const int64_t row = shape.head_dim * DTypeBytes(shape.dtype);
  const std::byte* source = StagingPlane(layer, plane);
  MutexLock lock(held_mutex_);
  int64_t first_row = 0;
  for (size_t prompt = 0; prompt < held_.size(); ++prompt) {
    const KvCache* held = held_[prompt];
    const int64_t rows = rows_[prompt];
    if (held != nullptr) {
      auto* target = static_cast<std::byte*>(plane == Plane::kKeys ? held->k(layer)
                                                                   : held->v(layer));
      for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
        std::memcpy(target + head * rows * row,
                    source + (head * shape.capacity + first_row) * row,
                    static_cast<size_t>(rows * row));
      }
    }
    first_row += rows;
  }
}

void KvWindow::DropPrompt(size_t prompt) {
  PBS_CHECK(staging_.bytes() > 0);
  MutexLock lock(held_mutex_);
  held_[prompt] = nullptr;
}

// `on_held` comes with the second copy of a layer. After a layer that failed it is not
// called for any later layer.
void KvWindow::OnCopied(const Status& status, const std::function<void()>& on_held) {
  bool held = false;
  {
    MutexLock lock(mutex_);
    if (status_.ok()) status_ = ToAbsl(status);
    held = status_.ok();
    if (on_held == nullptr) keys_copied_ = clock_.Now();
    if (on_held != nullptr && held) copying_ += 2 * (clock_.Now() - keys_copied_);
  }
  if (on_held == nullptr) return;
  if (held) on_held();
  MutexLock lock(mutex_);
  ++left_;
  changed_.NotifyAll();
}

}  // namespace pbs::server
