// The uploads of Attend calls, each from the start of its call until the engine has its
// job.
//
// An upload whose header was accepted is admitted work, and a drain waits for it. Other
// uploads hold no memory yet, and a drain ends them.
//
// Threading: safe from any thread; a slot belongs to one thread at a time. `end` is
// called with the lock held, so that the call exists until it returns; `end` must not
// call this object.
// Memory: one entry per upload, at most `uploads_max`.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/base/mutex.h"

namespace pbs::server {

class Uploads {
 public:
  // Ends an upload's call; may come more than once.
  using End = absl::AnyInvocable<void(absl::Status)>;

  // The slot of one upload, which its destructor frees. Move-only.
  class Slot {
   public:
    Slot() = default;
    Slot(Slot&& other) noexcept { *this = std::move(other); }
    Slot& operator=(Slot&& other) noexcept;
    ~Slot() { Reset(); }

    // Call it when the header has arrived. Unavailable once draining.
    absl::Status Admit();
    // `end` is not called after this.
    void Reset();

   private:
    friend class Uploads;
    Slot(Uploads* uploads, uint64_t id) : uploads_(uploads), id_(id) {}
    Uploads* uploads_ = nullptr;
    uint64_t id_ = 0;
  };

  explicit Uploads(int32_t uploads_max) : uploads_max_(uploads_max) {}

  // ResourceExhausted when uploads_max are under way, Unavailable once draining.
  absl::StatusOr<Slot> Take(End end);

  // Refuses uploads from here on and ends those without a header. Returns the number of
  // ended uploads. Calls `on_idle`, without the lock, once no admitted upload is left.
  int32_t Drain(absl::AnyInvocable<void()> on_idle);

  // Ends every upload with `status`; returns how many of them were admitted.
  int32_t Cut(const absl::Status& status);

  int32_t size() const;

  // The status of uploads that are refused while draining.
  static absl::Status Draining();

 private:
  struct Entry {
    End end;
    bool admitted = false;
  };

  bool IsIdle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Admit(uint64_t id);
  void Leave(uint64_t id);

  const int32_t uploads_max_;
  mutable Mutex mutex_;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  uint64_t last_id_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<uint64_t, Entry> entries_ ABSL_GUARDED_BY(mutex_);
  std::vector<absl::AnyInvocable<void()>> on_idle_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
