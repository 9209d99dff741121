// Slots that receive the summaries of runs on the host, with the durations of the runs.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "cuda/backend/driver.h"
#include "pbs/attention.h"

namespace pbs::cuda {

// There is one slot for each report that may be under way, so that one can arrive while
// the run of the next is called. A slot has pinned memory, which grows when a run needs
// more, and three events.
//
// Threading: one caller at a time. Memory: per slot 4 KiB, or the next power of two
// above the largest summary that it has held.
class ReportSlots {
 public:
  static StatusOr<std::unique_ptr<ReportSlots>> Create(Driver& driver);
  // Waits for reports under way.
  ~ReportSlots();
  ReportSlots(const ReportSlots&) = delete;
  ReportSlots& operator=(const ReportSlots&) = delete;

  int under_way() const;

  // Marks the begin and end of the run of the next report. Call them again for another
  // run without a report in between. Requires a slot that is not under way.
  Status MarkBegin();
  Status MarkEnd();
  // Enqueues the copy of `bytes` at `summary` on the device. After an error no report
  // is under way. Requires a slot that is not under way.
  Status Start(const void* summary, int64_t bytes);

  struct Arrived {
    const std::byte* summary = nullptr;  // until the next Start()
    double seconds = 0;                  // seconds between the marks
  };
  // Waits for the report that was started first. It is then no longer under way, after
  // an error too.
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
  // The first slot that is not under way. Runs without a report mark the same slot each
  // time.
  Slot& Next();
  Status Grow(Slot& slot, int64_t bytes);

  Driver& driver_;
  std::array<Slot, kReportsUnderWayMax> slots_;
  Slot* oldest_ = nullptr;  // the oldest slot under way
};

}  // namespace pbs::cuda
