// The device's implementation of primitives.h: operations of a warp on 16-bit tiles
// (from sm_80 on). ptx.h includes it.
#pragma once

#include <cstdint>

namespace pbs::cuda {

// ---- copies by a thread

// Copies 16 bytes asynchronously to an address of shared memory. Writes zeros, and
// reads nothing, when !inside. Both addresses are 16-byte aligned.
PBS_DEVICE void CopyAsync16(uint32_t target, const void* source, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target),
               "l"(source), "r"(inside ? 16 : 0)
               : "memory");
}
// The thread's copies since the last commit become a group.
PBS_DEVICE void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Returns when at most kGroups groups of the calling thread are under way. Other
// threads see its copies after a barrier.
template <int kGroups>
PBS_DEVICE void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- fragments; all 32 lanes call

// Loads four 8x8 matrices of 16-bit elements. Lane 8 i + j gives the address of the
// 16-byte row j of matrix i. Word i of lane l holds elements 2 (l % 4) and 2 (l % 4) +
// 1 of row l / 4 of matrix i; with transposition, of column l / 4.
PBS_DEVICE void LoadMatrices(uint32_t (&words)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}
PBS_DEVICE void LoadMatricesTransposed(uint32_t (&words)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// Stores four 8x8 matrices from fragments in the form of LoadMatrices(). Lane 8 i + j
// gives the address of the 16-byte row j of matrix i.
PBS_DEVICE void StoreMatrices(uint32_t row, const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// sums[16, 8] += a[16, 16] b[16, 8].
template <class Element>
PBS_DEVICE void MultiplyFragments(float* sums, const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
  if constexpr (Element::kIsBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace pbs::cuda
