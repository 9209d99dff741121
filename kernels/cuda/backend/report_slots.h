// Where the summaries of runs arrive on the host, and how long the runs took.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "cuda/backend/driver.h"
#include "pbs/attention.h"

namespace pbs::cuda {

// One slot for each report that may be under way, so that one can arrive while the run
// of the next is called. A slot is a piece of pinned memory, which grows with what runs
// ask for and is kept, and three events.
//
// Threading: one caller at a time. Memory: in each slot 4 KiB, or the next power of two
// above the largest summary that it has held.
class ReportSlots {
 public:
  static StatusOr<std::unique_ptr<ReportSlots>> Create(Driver& driver);
  // Waits for what is on its way.
  ~ReportSlots();
  ReportSlots(const ReportSlots&) = delete;
  ReportSlots& operator=(const ReportSlots&) = delete;

  int under_way() const;

  // Around the run that the next report is of; again when there was another one in
  // between. Requires a slot that is not under way.
  Status MarkBegin();
  Status MarkEnd();
  // Enqueues the copy of `bytes` at `summary` on the device. On an error there is no
  // report. Requires a slot that is not under way.
  Status Start(const void* summary, int64_t bytes);

  struct Arrived {
    const std::byte* summary = nullptr;  // until the next Start()
    double seconds = 0;                  // between the marks
  };
  // Waits for the report that was started first. It is under way no more, also after an
  // error.
  StatusOr<Arrived> Finish();

 private:
  struct Slot {
    void* data = nullptr;
    int64_t bytes = 0;
    EventId began = 0;
    EventId ended = 0;
    EventId copied = 0;
    bool under_way = false;
  };

  explicit ReportSlots(Driver& driver) : driver_(driver) {}
  // The first that is not under way: runs without a report mark the same one each time.
  Slot& Next();
  Status Grow(Slot& slot, int64_t bytes);

  Driver& driver_;
  std::array<Slot, kReportsUnderWayMax> slots_;
  Slot* oldest_ = nullptr;  // of those under way
};

}  // namespace pbs::cuda
