#include "cuda/backend/report_slots.h"

#include <algorithm>
#include <bit>

#include "pbs/check.h"

namespace pbs::cuda {
namespace {

constexpr int64_t kSlotBytesMin = 4096;

}  // namespace

StatusOr<std::unique_ptr<ReportSlots>> ReportSlots::Create(Driver& driver) {
  std::unique_ptr<ReportSlots> slots(new ReportSlots(driver));
  for (Slot& slot : slots->slots_) {
    for (EventId* event : {&slot.began, &slot.ended, &slot.copied}) {
      PBS_ASSIGN_OR_RETURN(*event, driver.CreateEvent());
    }
    PBS_RETURN_IF_ERROR(slots->Grow(slot, kSlotBytesMin));
  }
  return slots;
}

ReportSlots::~ReportSlots() {
  for (const Slot& slot : slots_) {
    if (slot.data == nullptr) continue;
    // An error is in the driver's health.
    static_cast<void>(driver_.Synchronize(slot.copied));
    driver_.FreeHost(slot.data);
  }
}

int ReportSlots::under_way() const {
  return static_cast<int>(std::count_if(
      slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.under_way; }));
}

ReportSlots::Slot& ReportSlots::Next() {
  const auto next = std::find_if(slots_.begin(), slots_.end(),
                                 [](const Slot& slot) { return !slot.under_way; });
  PBS_CHECK(next != slots_.end());
  return *next;
}

Status ReportSlots::Grow(Slot& slot, int64_t bytes) {
  const auto wanted = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes)));
  if (slot.bytes >= wanted) return OkStatus();
  PBS_ASSIGN_OR_RETURN(void* data, driver_.AllocateHost(wanted));
  if (slot.data != nullptr) driver_.FreeHost(slot.data);
  slot.data = data;
  slot.bytes = wanted;
  return OkStatus();
}

Status ReportSlots::MarkBegin() {
  return driver_.Record(Next().began, StreamId::kCompute);
}

Status ReportSlots::MarkEnd() {
  return driver_.Record(Next().ended, StreamId::kCompute);
}

Status ReportSlots::Start(const void* summary, int64_t bytes) {
  Slot& slot = Next();
  PBS_RETURN_IF_ERROR(Grow(slot, bytes));
  PBS_RETURN_IF_ERROR(
      driver_.CopyToHost(StreamId::kCompute, summary, slot.data, bytes));
  PBS_RETURN_IF_ERROR(driver_.Record(slot.copied, StreamId::kCompute));
  if (under_way() == 0) oldest_ = &slot;
  slot.under_way = true;
  return OkStatus();
}

StatusOr<ReportSlots::Arrived> ReportSlots::Finish() {
  PBS_CHECK(under_way() > 0);
  Slot& slot = *oldest_;
  slot.under_way = false;
  // Of two there is one other.
  static_assert(kReportsUnderWayMax == 2);
  oldest_ = &slots_[&slot == slots_.data() ? 1 : 0];
  PBS_RETURN_IF_ERROR(driver_.Synchronize(slot.copied));
  PBS_ASSIGN_OR_RETURN(const double seconds,
                       driver_.SecondsBetween(slot.began, slot.ended));
  return Arrived{static_cast<const std::byte*>(slot.data), seconds};
}

}  // namespace pbs::cuda
