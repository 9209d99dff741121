#include "server/service/write_loop.h"
#include <atomic>

namespace pbs::server {

void WriteLoop::Wake() {
  MutexLock lock(mutex_);
  if (busy_) {
    woken_ = true;
    return;
  }
  busy_ = true;
  // The stream lives until End(), and only Run() calls that.
  movers_.Post([this] { Run(); });
}

void WriteLoop::OnWriteDone(bool ok) {
  ticks_.fetch_add(1, std::memory_order_relaxed);
  message_.Clear();
  if (!ok) stream_.OnBroken();
  Run();
}

void WriteLoop::Run() {
  while (true) {
    {
      MutexLock lock(mutex_);
      woken_ = false;
    }
    NextWrite next = stream_.Next();
    if (next.kind_ == NextWrite::Kind::kMessage) {
      message_.Swap(&next.message_);
      ticks_.fetch_add(1, std::memory_order_relaxed);
      stream_.Send(&message_);  // OnWriteDone() may run before this returns
      return;
    }
    if (next.kind_ == NextWrite::Kind::kEnd) {
      stream_.End(next.status_);  // busy_ stays: no Run() follows
      return;
    }
    MutexLock lock(mutex_);
    if (!woken_) {
      busy_ = false;
      return;
    }
  }
}

}  // namespace pbs::server
