// Reads the rows of one block with 128 threads and computes their mean.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/selection_params.h"
#include "cuda/tiles/shared_rows.h"

namespace pbs::cuda {

// Number of partial sums of a block. Rows whose indices differ by a multiple of it are
// summed first, then the partial sums, both in rising order, so that every kernel
// computes means with the same bits.
PBS_HOST_DEVICE constexpr int PartialSums(int head_dim) {
  return 128 / PieceGroup(head_dim / 8);
}
// The mean of a column from its partial sums, which are `width` apart in shared memory.
// The divisor is the size of a whole block, for short blocks too (section 3.1 of
// docs/KERNELS.md).
PBS_DEVICE float MeanOfPartialSums(const float* sums, int count, int width) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += LoadShared(sums + i * width);
  return sum / static_cast<float>(kBlockTokens);
}

template <class Element, int kHeadDim>
class BlockRows {
 public:
  static constexpr int kThreads = 128;
  static constexpr int kPieces = kHeadDim / 8;        // 16 bytes each
  static constexpr int kLanes = PieceGroup(kPieces);  // threads of a row
  static constexpr int kGroups = kPieces / kLanes;    // pieces of a row for a thread
  static constexpr int kRowsAtOnce = kThreads / kLanes;
  // Rows that a thread loads at once, kGroups pieces of each: 128 bytes (96 at head dim
  // 96).
  static constexpr int kRowsUnderWay = kGroups == 3 ? 2 : 8 / kGroups;
  static_assert(kBlockTokens % (kRowsUnderWay * kRowsAtOnce) == 0);
  static_assert(kRowsAtOnce == PartialSums(kHeadDim));
  static constexpr int kSharedBytes = kRowsAtOnce * kHeadDim * 4;

  // For each row of the block source(row) gives its address, or null for a missing row,
  // which counts as zeros. visit(row, group, piece, values) is called for every piece;
  // group is piece / kLanes, a constant for the compiler. A thread visits its rows in
  // rising order.
  template <class Source, class Visit>
  PBS_DEVICE static void ForEachPiece(Source&& source, Visit&& visit) {
    PBS_NO_UNROLL
    for (int first = ThreadIndex() / kLanes; first < kBlockTokens;
         first += kRowsUnderWay * kRowsAtOnce) {
      Words4 values[kRowsUnderWay][kGroups] = {};
      PBS_UNROLL
      for (int r = 0; r < kRowsUnderWay; ++r) {
        const uint16_t* at = source(first + r * kRowsAtOnce);
        if (at == nullptr) continue;
        PBS_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          values[r][group] =
              LoadGlobal(reinterpret_cast<const Words4*>(at + Piece(group) * 8));
        }
      }
      PBS_UNROLL
      for (int r = 0; r < kRowsUnderWay; ++r) {
        PBS_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          visit(first + r * kRowsAtOnce, group, Piece(group), values[r][group]);
        }
      }
    }
  }

  // Adds a piece that ForEachPiece() visited.
  PBS_DEVICE void Add(int group, const Words4& values) {
    float(&sums)[8] = sums_[group];
    PBS_UNROLL
    for (int i = 0; i < 4; ++i) {
      sums[2 * i] += Element::Low(values.words[i]);
      sums[2 * i + 1] += Element::High(values.words[i]);
    }
  }

  // Calls store(column, mean) once per column of the head.
  template <class Store>
  PBS_DEVICE void Mean(ScoreRounding rounding, Store&& store) const {
    auto* shared = reinterpret_cast<float*>(SharedMemory());
    PBS_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      PBS_UNROLL
      for (int i = 0; i < 8; ++i) {
        StoreShared(shared + ThreadIndex() / kLanes * kHeadDim + Piece(group) * 8 + i,
                    sums_[group][i]);
      }
    }
    SyncThreads();
    for (int column = ThreadIndex(); column < kHeadDim; column += kThreads) {
      const float mean = MeanOfPartialSums(shared + column, kRowsAtOnce, kHeadDim);
      store(column, rounding == ScoreRounding::kNone ? mean : Element::Round(mean));
    }
  }

 private:
  // The piece of the calling thread in a group.
  PBS_DEVICE static int Piece(int group) {
    return group * kLanes + ThreadIndex() % kLanes;
  }

  float sums_[kGroups][8] = {};
};

}  // namespace pbs::cuda
