#include "emulator/synchronization.h"

#include <string>

#include "emulator/block.h"

namespace pbs::emulator {
namespace {

void Meet(Gathering& gathering, const char* what, const Location& where) {
  const int64_t round = gathering.rounds;
  if (!gathering.Arrive()) WaitWhileEqual(&gathering.rounds, round, what, where);
}

Gathering& Named(int id, int threads, const Location& where) {
  if (id < 0 || id >= kNamedBarriers) {
    Fail("barrier " + std::to_string(id) + " is outside [0, 15]", where);
  }
  if (threads <= 0 || threads % kWarpThreads != 0) {
    Fail(std::to_string(threads) + " threads at a barrier are no multiple of 32",
         where);
  }
  Gathering& barrier = OwnBlock().named[static_cast<size_t>(id)];
  if (barrier.arrived > 0 && barrier.expected != threads) {
    Fail("barrier " + std::to_string(id) + " gathers " +
             std::to_string(barrier.expected) + " threads, not " +
             std::to_string(threads),
         where);
  }
  barrier.expected = threads;
  return barrier;
}

Mbarrier& Find(const uint64_t* barrier, const Location& where) {
  const auto found = OwnBlock().mbarriers.find(barrier);
  if (found == OwnBlock().mbarriers.end()) {
    Fail("a transaction barrier is used before it is initialised", where);
  }
  return found->second;
}

void EndPhaseIfDue(Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phases;
}

}  // namespace

void SyncThreads(const Location& where) {
  Meet(OwnBlock().all, "__syncthreads", where);
}

void BarrierSync(int id, int threads, const Location& where) {
  Meet(Named(id, threads, where), "a named barrier", where);
}

void BarrierArrive(int id, int threads, const Location& where) {
  Named(id, threads, where).Arrive();
  Preempt();
}

void MbarrierInit(uint64_t* barrier, int arrivals, const Location& where) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0 || !IsShared(barrier)) {
    Fail("a transaction barrier is not at 8 aligned bytes of shared memory", where);
  }
  MarkWritten(barrier, 8, where);
  OwnBlock().mbarriers[barrier] = {.arrivals = arrivals, .missing = arrivals};
}

void MbarrierArrive(uint64_t* barrier, int64_t announced_bytes, const Location& where) {
  Mbarrier& state = Find(barrier, where);
  if (state.missing == 0) Fail("more arrivals than a phase of the barrier has", where);
  --state.missing;
  state.bytes += announced_bytes;
  EndPhaseIfDue(state);
  Preempt();
}

void MbarrierWait(uint64_t* barrier, int parity, const Location& where) {
  const Mbarrier& state = Find(barrier, where);
  // Parity p has ended when the phase under way has another one.
  while ((state.phases & 1) == (parity & 1)) {
    WaitWhileEqual(&state.phases, state.phases, "a transaction barrier", where);
  }
}

void MbarrierBytesCame(uint64_t* barrier, int64_t bytes, const Location& where) {
  Mbarrier& state = Find(barrier, where);
  state.bytes -= bytes;
  EndPhaseIfDue(state);
}

void Together(void* part, void (*work)(const WarpParts& parts), const Location& where) {
  const auto thread = static_cast<size_t>(ThreadIndex());
  const size_t warp = thread / kWarpThreads;
  WarpParts& parts = OwnBlock().warp_parts[warp];
  parts[thread % kWarpThreads] = part;
  Gathering& gathering = OwnBlock().warps[warp];
  if (gathering.arrived + 1 == gathering.expected) work(parts);
  Meet(gathering, "a warp's step", where);
}

}  // namespace pbs::emulator
