#include "cuda/backend/later_downloads.h"

#include <utility>

namespace pbs::cuda {

StatusOr<std::unique_ptr<LaterDownloads>> LaterDownloads::Create(Driver& driver) {
  std::unique_ptr<LaterDownloads> downloads(new LaterDownloads(driver));
  PBS_ASSIGN_OR_RETURN(downloads->copies_,
                       StagedCopies::Create(driver, StreamId::kDownload));
  downloads->thread_ = std::thread([self = downloads.get()] { self->Run(); });
  return downloads;
}

LaterDownloads::~LaterDownloads() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void LaterDownloads::Add(const void* source, void* target, int64_t bytes,
                         std::function<void(const Status&)> done) {
  StatusOr<EventId> called = MarkCalled();
  {
    const std::lock_guard lock(mutex_);
    waiting_.push_back({source, target, bytes, std::move(called), std::move(done)});
  }
  changed_.notify_all();
}

StatusOr<EventId> LaterDownloads::MarkCalled() {
  EventId event = 0;
  std::unique_lock lock(mutex_);
  if (unused_.empty()) {
    lock.unlock();
    PBS_ASSIGN_OR_RETURN(event, driver_.CreateEvent());
  } else {
    event = unused_.back();
    unused_.pop_back();
    lock.unlock();
  }
  PBS_RETURN_IF_ERROR(driver_.Record(event, StreamId::kCompute));
  return event;
}

void LaterDownloads::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return ending_ || !waiting_.empty(); });
    if (waiting_.empty()) return;
    Download download = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    download.done(Copy(download));
    lock.lock();
    if (download.called.ok()) unused_.push_back(*download.called);
  }
}

Status LaterDownloads::Copy(const Download& download) {
  PBS_RETURN_IF_ERROR(download.called.status());
  PBS_RETURN_IF_ERROR(driver_.WaitFor(*download.called, StreamId::kDownload));
  return copies_->ToHost(download.source, download.target, download.bytes);
}

}  // namespace pbs::cuda
