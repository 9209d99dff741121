#include "server/engine/kv_window.h"

#include <algorithm>
#include <utility>

#include "pbs/check.h"
#include "server/base/status.h"

namespace pbs::server {

int64_t KvWindow::BytesOf(const KvShape& shape) {
  return 2 * shape.plane_bytes() * std::min(kLayers, shape.num_layers);
}

absl::StatusOr<std::unique_ptr<KvWindow>> KvWindow::Create(const KvCache& held,
                                                           Backend& backend,
                                                           const Clock& clock) {
  const KvShape& shape = held.shape();
  PBS_ABSL_ASSIGN_OR_RETURN(KvCache cache,
                            ToAbsl(KvCache::CreateWindow(
                                shape, std::min(kLayers, shape.num_layers), backend)));
  return std::unique_ptr<KvWindow>(
      new KvWindow(held, std::move(cache), backend, clock));
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
  const int64_t bytes = held_.shape().plane_bytes();
  backend_.DownloadLater(cache_.k(layer), held_.k(layer), bytes,
                         [this](const Status& status) { OnCopied(status, nullptr); });
  backend_.DownloadLater(cache_.v(layer), held_.v(layer), bytes,
                         [this, on_held = std::move(on_held)](const Status& status) {
                           OnCopied(status, &on_held);
                         });
}

// `on_held` comes with the second copy of a layer. Nobody is told of a layer behind one
// that failed.
void KvWindow::OnCopied(const Status& status, const std::function<void()>* on_held) {
  bool held = false;
  {
    MutexLock lock(mutex_);
    if (status_.ok()) status_ = ToAbsl(status);
    held = status_.ok();
    if (on_held == nullptr) keys_copied_ = clock_.Now();
    if (on_held != nullptr && held) copying_ += 2 * (clock_.Now() - keys_copied_);
  }
  if (on_held == nullptr) return;
  if (held) (*on_held)();
  MutexLock lock(mutex_);
  ++left_;
  changed_.NotifyAll();
}

}  // namespace pbs::server
