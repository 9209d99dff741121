// Barriers, with which threads of a block wait for each other and for copies.
#pragma once

#include <array>
#include <cstdint>

#include "emulator/machine.h"

namespace pbs::emulator {

void SyncThreads(const Location& where);
// `threads` threads meet at barrier `id`. Faults on an id outside [0, 16), a count that
// is no multiple of 32, and threads that disagree about the count.
void BarrierSync(int id, int threads, const Location& where);
void BarrierArrive(int id, int threads, const Location& where);

// Transaction barriers are known by their address in shared memory. A phase ends when
// all its arrivals and all announced bytes have come; waiting on a parity returns once
// the phase of that parity has ended.
void MbarrierInit(uint64_t* barrier, int arrivals, const Location& where);
void MbarrierArrive(uint64_t* barrier, int64_t announced_bytes, const Location& where);
void MbarrierWait(uint64_t* barrier, int parity, const Location& where);
void MbarrierBytesCame(uint64_t* barrier, int64_t bytes, const Location& where);

// Each lane of the caller's warp brings a part. The last lane to arrive works on all
// parts while the others wait.
using WarpParts = std::array<void*, 32>;  // null: no such lane
void Together(void* part, void (*work)(const WarpParts& parts), const Location& where);

}  // namespace pbs::emulator
