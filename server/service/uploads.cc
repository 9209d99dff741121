#include "server/service/uploads.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pbs/check.h"

namespace pbs::server {

Uploads::Slot& Uploads::Slot::operator=(Slot&& other) noexcept {
  if (this != &other) {
    Reset();
    uploads_ = std::exchange(other.uploads_, nullptr);
    id_ = other.id_;
  }
  return *this;
}

absl::Status Uploads::Slot::Admit() {
  PBS_CHECK(uploads_ != nullptr);
  return uploads_->Admit(id_);
}

void Uploads::Slot::Reset() {
  if (uploads_ != nullptr) uploads_->Leave(id_);
  uploads_ = nullptr;
}

absl::Status Uploads::Draining() {
  return absl::UnavailableError("draining: this server takes no new work");
}

absl::StatusOr<Uploads::Slot> Uploads::Take(End end) {
  MutexLock lock(mutex_);
  if (draining_) return Draining();
  if (static_cast<int32_t>(entries_.size()) >= uploads_max_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("uploads under way reach upload_requests_max ", uploads_max_));
  }
  entries_.emplace(++last_id_, Entry{std::move(end)});
  return Slot(this, last_id_);
}

absl::Status Uploads::Admit(uint64_t id) {
  MutexLock lock(mutex_);
  if (draining_) return Draining();
  entries_.at(id).admitted = true;
  return absl::OkStatus();
}

void Uploads::Leave(uint64_t id) {
  Entry left;  // destroyed after the lock is released
  std::vector<absl::AnyInvocable<void()>> callbacks;
  {
    MutexLock lock(mutex_);
    const auto entry = entries_.find(id);
    left = std::move(entry->second);
    entries_.erase(entry);
    if (draining_ && IsIdle()) callbacks.swap(on_idle_);
  }
  for (auto& callback : callbacks) callback();
}

bool Uploads::IsIdle() const {
  return std::none_of(entries_.begin(), entries_.end(),
                      [](const auto& entry) { return entry.second.admitted; });
}

int32_t Uploads::Drain(absl::AnyInvocable<void()> on_idle) {
  int32_t num_ended = 0;
  {
    MutexLock lock(mutex_);
    draining_ = true;
    for (auto& [id, entry] : entries_) {
      if (entry.admitted) continue;
      entry.end(Draining());
      ++num_ended;
    }
    if (!IsIdle()) {
      on_idle_.push_back(std::move(on_idle));
      return num_ended;
    }
  }
  on_idle();
  return num_ended;
}

int32_t Uploads::Cut(const absl::Status& status) {
  MutexLock lock(mutex_);
  int32_t num_admitted = 0;
  for (auto& [id, entry] : entries_) {
    entry.end(status);
    num_admitted += entry.admitted ? 1 : 0;
  }
  return num_admitted;
}

int32_t Uploads::size() const {
  MutexLock lock(mutex_);
  return static_cast<int32_t>(entries_.size());
}

}  // namespace pbs::server
