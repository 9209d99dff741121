// Bounded waits, for a build that examines a hang (PBS_BOUNDED_WAITS). The first wait
// that takes longer than kWaitNanosecondsMax records its barrier and returns. Later
// waits return after kLaterWaitNanosecondsMax, because many waits follow one that never
// ends. So the kernel ends soon, with wrong results. (A trap would end it sooner, but
// then ptxas serialises the products, which is another kernel.) ptx_bulk.h includes it,
// for the one source file that has the pointer.
#pragma once

#include <cstdint>

#include "cuda/primitives/hang_record.h"

namespace pbs::cuda {

constexpr uint64_t kWaitNanosecondsMax = 1'000'000'000;
constexpr uint64_t kLaterWaitNanosecondsMax = 1'000'000;

// Memory that the host can read (cuda/backend/hang_watch.h); null: nothing is recorded.
static __device__ HangRecord* hang_record;
static __device__ int hang_claimed;

// The noted tile of each warpgroup.
PBS_DEVICE int& NotedTile() {
  __shared__ int tiles[8];
  return tiles[threadIdx.x / 128];
}

PBS_DEVICE void BoundedWait(uint32_t barrier, int parity) {
  const uint32_t offset = barrier - SharedAddress(SharedMemory());
  const uint32_t tile = SharedAddress(&NotedTile());
  asm volatile(
      "{\n.reg .pred done, late, first;\n.reg .u64 begin, now, limit, record;\n"
      ".reg .u32 claimed, word;\n"
      "mov.u64 begin, %%globaltimer;\nwait_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "mov.u64 now, %%globaltimer;\nsub.u64 now, now, begin;\n"
      "ld.volatile.global.u32 claimed, [%4];\nsetp.ne.u32 first, claimed, 0;\n"
      "selp.u64 limit, %7, %6, first;\n"
      "setp.gt.and.u64 late, now, limit, !done;\n"
      "mov.u32 claimed, 1;\n@late atom.global.cas.b32 claimed, [%4], 0, 1;\n"
      "ld.global.u64 record, [%5];\n"
      "setp.eq.and.u32 first, claimed, 0, late;\n"
      "setp.ne.and.u64 first, record, 0, first;\n"
      "mov.u32 word, %%ctaid.x;\n@first st.global.u32 [record + 4], word;\n"
      "mov.u32 word, %%tid.x;\nshr.u32 word, word, 7;\n"
      "@first st.global.u32 [record + 8], word;\n"
      "@first st.global.u32 [record + 12], %2;\n"
      "@first st.global.u32 [record + 16], %1;\n"
      "ld.shared.u32 word, [%3];\n@first st.global.u32 [record + 20], word;\n"
      "@first fence.sc.sys;\nmov.u32 word, 1;\n"
      "@first st.global.u32 [record], word;\n"
      "or.pred done, done, late;\n"
      "@!done bra wait_%=;\n}" ::"r"(barrier),
      "r"(parity), "r"(offset), "r"(tile), "l"(&hang_claimed), "l"(&hang_record),
      "n"(kWaitNanosecondsMax), "n"(kLaterWaitNanosecondsMax)
      : "memory");
}

}  // namespace pbs::cuda
