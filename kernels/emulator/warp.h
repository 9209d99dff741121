// Operations of warps: votes, asynchronous copies by single threads, loads of 16-bit
// matrices, and products of fragments (from sm_80 on).
#pragma once

#include <array>
#include <cstdint>

#include "emulator/machine.h"

namespace pbs::emulator {

// 16 bytes to an offset in shared memory, at a random later moment; the target is
// poisoned until then. Zeros when !inside. Both sides 16-byte aligned.
void CopyAsync16(uint32_t target, const void* source, bool inside,
                 const Location& where);
void CopyAsyncCommit();
// Returns when at most `groups` committed groups of the calling thread are under way.
void CopyAsyncWait(int groups, const Location& where);

// Bit l is the vote of lane l.
uint32_t Ballot(bool vote, const Location& where);

// As ldmatrix.x4: four 8x8 matrices of 16-bit elements, from each lane the offset of a
// row in shared memory. Rows of a matrix that share banks are a fault: a slow kernel.
std::array<uint32_t, 4> LoadMatrices(uint32_t row, bool transposed,
                                     const Location& where);

// As stmatrix.x4, the inverse: from each lane the offset of a row to write.
void StoreMatrices(uint32_t row, const std::array<uint32_t, 4>& words,
                   const Location& where);

// As mma.m16n8k16: sums[16, 8] += a[16, 16] b[16, 8] in the lanes' fragments.
void MultiplyFragments(float* sums, const std::array<uint32_t, 4>& a,
                       const std::array<uint32_t, 2>& b, bool bf16,
                       const Location& where);

}  // namespace pbs::emulator
