// Rows of 16-bit elements in shared memory, in pieces of eight elements. The pieces of
// a row are permuted so that the eight rows of a matrix load are in different banks.
#pragma once

#include "cuda/primitives/host_device.h"
#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

// Pieces are permuted in groups of eight, or of four when a row has an odd number of
// fours and so begins half a bank line after the row before.
PBS_HOST_DEVICE constexpr int PieceGroup(int pieces) { return pieces % 8 == 0 ? 8 : 4; }
// Index of piece `piece` of row `row` after the permutation.
PBS_HOST_DEVICE constexpr int ExchangedPiece(int group, int row, int piece) {
  return group == 8 ? piece ^ (row & 7) : piece ^ (row >> 1 & 3);
}

// 128-byte aligned.
template <int kNumRows, int kWidth>
struct SharedRows {
  static constexpr int kPieces = kWidth / 8;  // 16 bytes each
  static constexpr int kGroup = PieceGroup(kPieces);
  static constexpr int kRowBytes = kWidth * 2;
  static_assert(kPieces % kGroup == 0);

  uint16_t elements[kNumRows * kWidth];

  // Address of piece `piece` of row `row`.
  PBS_DEVICE uint32_t Address(int row, int piece) const {
    return SharedAddress(elements) + row * kRowBytes +
           ExchangedPiece(kGroup, row, piece) * 16;
  }
  // Moves an address `rows` rows down (a multiple of eight) and `pieces` pieces right
  // (even). The address must be that of piece 0 or 1 of its row.
  PBS_DEVICE static uint32_t Moved(uint32_t address, int rows, int pieces) {
    return (address ^ pieces % kGroup * 16) + pieces / kGroup * (kGroup * 16) +
           rows * kRowBytes;
  }

  // Starts asynchronous copies of all rows with kThreads threads. Row r is copied from
  // `source` + r * stride when begin <= r < end; other rows become zeros without a
  // read.
  template <int kThreads>
  PBS_DEVICE void Load(const uint16_t* source, int64_t stride, int begin, int end) {
    constexpr int kRowsAtOnce = kThreads / kGroup;
    static_assert(kNumRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0);
    const int first = ThreadIndex() / kGroup;
    const int piece = ThreadIndex() % kGroup;
    const uint32_t target = Address(first, piece);
    source += first * stride + piece * 8;
    PBS_UNROLL
    for (int row = 0; row < kNumRows; row += kRowsAtOnce) {
      const bool inside = first + row >= begin && first + row < end;
      PBS_UNROLL
      for (int group = 0; group < kPieces; group += kGroup) {
        CopyAsync16(target + row * kRowBytes + group * 16,
                    source + row * stride + group * 8, inside);
      }
    }
  }
};

}  // namespace pbs::cuda
