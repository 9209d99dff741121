// The device's implementation of primitives.h: barriers that count bytes, and
// asynchronous copies of boxes and rows between global and shared memory, which one
// thread starts (compute capability 9.0). ptx.h includes it.
#pragma once

#include <cuda.h>

#include <cstdint>

#if defined(PBS_BOUNDED_WAITS)
#include "cuda/primitives/bounded_wait.h"
#endif

namespace pbs::cuda {

// Created by the host (cuTensorMapEncodeTiled): [batch, heads, rows, width], boxes of
// 64 columns, 128-byte swizzle.
using TensorMap = CUtensorMap;

// ---- barriers

// Counts arrivals and bytes of a phase; phases have alternating parity, the first 0.
struct Mbarrier {
  uint64_t word;
};
PBS_DEVICE void MbarrierInit(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals));
}
// Makes initialised barriers visible to copies. Call it before the barrier that
// releases the other threads.
PBS_DEVICE void MbarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
PBS_DEVICE void MbarrierArrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}
// Arrives and announces the bytes of copies.
PBS_DEVICE void MbarrierArriveExpect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}
// Returns when the phase of this parity has ended; at once when it is not under way.
PBS_DEVICE void MbarrierWait(Mbarrier* barrier, int parity) {
#if defined(PBS_BOUNDED_WAITS)
  BoundedWait(SharedAddress(barrier), parity);
#else
  asm volatile(
      "{\n.reg .pred done;\nwait_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_%=;\n}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// Records, for reports of a hang, the tile that the calling warpgroup has begun.
PBS_DEVICE void NoteTile(int tile) {
#if defined(PBS_BOUNDED_WAITS)
  NotedTile() = tile;
#else
  static_cast<void>(tile);
#endif
}

// ---- copies into shared memory

// Eviction policy of the second-level cache for the bytes of a copy.
struct CachePolicy {
  uint64_t word;
};
PBS_DEVICE CachePolicy EvictFirst() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.word));
  return policy;
}
PBS_DEVICE CachePolicy EvictLast() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy.word));
  return policy;
}

// Copies one box of a tensor map to shared memory, 1024-byte aligned. Rows and columns
// outside the tensor become zeros. One thread calls.
PBS_DEVICE void CopyBox(void* target, const TensorMap& map, Mbarrier* barrier,
                        int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::"
      "bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(SharedAddress(target)),
      "l"(&map), "r"(SharedAddress(barrier)), "r"(column), "r"(row), "r"(head),
      "r"(batch)
      : "memory");
}
PBS_DEVICE void CopyBox(void* target, const TensorMap& map, Mbarrier* barrier,
                        int column, int row, int head, int batch, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::"
      "bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(SharedAddress(target)),
      "l"(&map), "r"(SharedAddress(barrier)), "r"(column), "r"(row), "r"(head),
      "r"(batch), "l"(policy.word)
      : "memory");
}
// Copies contiguous bytes; addresses and size are multiples of 16.
PBS_DEVICE void CopyBytes(void* target, const void* source, int bytes,
                          Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(SharedAddress(target)),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

// ---- copies out of shared memory

// Makes the calling thread's writes to shared memory visible to copies and products
// that begin after it.
PBS_DEVICE void ProxyFence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Copies one box of shared memory to a tensor, without rows outside the tensor. One
// thread calls it, StoreCommit() and StoreWaitRead().
PBS_DEVICE void StoreBox(const TensorMap& map, const void* source, int column, int row,
                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(SharedAddress(source)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// The thread's stores since the last commit become a group.
PBS_DEVICE void StoreCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Returns when the stores of all groups have read shared memory.
PBS_DEVICE void StoreWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace pbs::cuda
