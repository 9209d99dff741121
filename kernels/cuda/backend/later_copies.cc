#include "cuda/backend/later_copies.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace pbs::cuda {

StatusOr<std::unique_ptr<LaterCopies>> LaterCopies::Create(Driver& driver,
                                                           StreamId stream) {
  std::unique_ptr<LaterCopies> copies(new LaterCopies(driver, stream));
  PBS_ASSIGN_OR_RETURN(copies->ring_, StagingRing::Create(driver, stream));
  copies->thread_ = std::thread([self = copies.get()] { self->Run(); });
  return copies;
}

LaterCopies::~LaterCopies() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void LaterCopies::Add(const void* source, void* target, int64_t bytes,
                      std::function<void(const Status&)> done) {
  Copy copy = {.source = static_cast<const std::byte*>(source),
               .target = static_cast<std::byte*>(target),
               .bytes = bytes,
               .done = std::move(done)};
  if (to_host_) {
    const StatusOr<EventId> called = MarkCalled();
    copy.status = called.status();
    if (called.ok()) copy.called = *called;
  }
  {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(std::move(copy));
  }
  changed_.notify_all();
}

StatusOr<EventId> LaterCopies::MarkCalled() {
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

void LaterCopies::Run() {
  while (true) {
    if (!taken_.empty() && !taken_.back().all_begun()) {
      parts_.size() < StagingRing::kNumPieces ? BeginPart() : EndPart();
    } else if (!Take()) {
      if (taken_.empty()) return;
      EndPart();
    }
    TellEnded();
  }
}

bool LaterCopies::Take() {
  {
    std::unique_lock lock(mutex_);
    if (taken_.empty()) {
      changed_.wait(lock, [this] { return ending_ || !waiting_.empty(); });
    }
    if (waiting_.empty()) return false;
    taken_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
  Copy& copy = taken_.back();
  if (copy.status.ok() && copy.called.has_value()) {
    copy.status = driver_.WaitFor(*copy.called, stream_);
  }
  return true;
}

void LaterCopies::BeginPart() {
  Copy& copy = taken_.back();
  const int64_t at = copy.begun;
  const int64_t bytes = std::min(StagingRing::kPieceBytes, copy.bytes - at);
  const int64_t number = num_parts_++;
  copy.status = to_host_
                    ? ring_->Fetch(number, copy.source + at, bytes)
                    : ring_->Send(number, copy.source + at, copy.target + at, bytes);
  copy.begun += bytes;
  // Even one that failed may be under way.
  ++copy.under_way;
  parts_.push_back({&copy, number, copy.target + at, bytes});
}

void LaterCopies::EndPart() {
  const Part part = parts_.front();
  parts_.pop_front();
  Copy& copy = *part.copy;
  const Status status = ring_->Wait(part.number);
  if (copy.status.ok()) copy.status = status;
  if (to_host_ && copy.status.ok()) {
    std::memcpy(part.target, ring_->Arrived(part.number),
                static_cast<size_t>(part.bytes));
  }
  --copy.under_way;
}

void LaterCopies::TellEnded() {
  while (!taken_.empty() && taken_.front().all_begun() &&
         taken_.front().under_way == 0) {
    const Copy copy = std::move(taken_.front());
    taken_.pop_front();
    copy.done(copy.status);
    if (!copy.called.has_value()) continue;
    const std::lock_guard lock(mutex_);
    unused_.push_back(*copy.called);
  }
}

}  // namespace pbs::cuda
