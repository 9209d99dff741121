// Chooses the largest columns and distances of a head (minference), without a sort: a
// bisection of the range of bits of floats finds the smallest chosen mass. Of equal
// masses the lower index is taken first.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/diagonals.h"
#include "cuda/selection/mass_cut.h"
#include "cuda/selection/sequences.h"
#include "cuda/tiles/warp_sums.h"

namespace pbs::cuda {

// Grid [2, num_heads, num_sequences], 512 threads: columns first, then distances.
// Masses are in global memory.
class ChooseKeyLines {
 public:
  static constexpr int kThreads = 512;
  static constexpr int kSharedBytes = 2 * (kThreads / 32) * 4;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    const int each = params.num_heads * params.num_sequences;
    const bool distances = BlockIndex() >= each;
    const int at = BlockIndex() % each;
    ChooseKeyLines(params, at / params.num_sequences, at % params.num_sequences)
        .Run(distances);
  }

 private:
  static constexpr int kWarps = kThreads / 32;

  PBS_DEVICE ChooseKeyLines(const SelectionParams& params, int head, int sequence)
      : params_(params),
        head_(head),
        sequence_(LoadGlobal(params.sequences + sequence)),
        first_block_(int64_t{head} * params.total_key_blocks +
                     sequence_.key_block_begin) {}

  PBS_DEVICE void Run(bool distances) {
    if (sequence_.sparse == 0) return;
    const KeyLineParams& lines = params_.key_lines;
    if (distances) {
      masses_ = lines.distances + first_block_ * kBlockTokens;
      forced_ = kForcedDistances;
      StoreDistances();
      SyncThreads();
      const int count = NumDistances(lines.slash_tokens, sequence_.k_len);
      Choose(Cut(count), count, lines.distance_bits, nullptr);
    } else {
      masses_ = params_.lines.columns + first_block_ * kBlockTokens;
      forced_ = kForcedColumns;
      const int count = NumColumns(lines.vertical_tokens, sequence_.k_len);
      Choose(Cut(count), count, lines.column_bits,
             lines.chosen +
                 (int64_t{head_} * lines.total_gathered + sequence_.gathered_begin) *
                     kBlockTokens);
    }
  }

  // Diagonals in the order of their distances. Those of sorted keys behind the query
  // would count as distance 0, which is chosen in any case.
  PBS_DEVICE void StoreDistances() const {
    for (int distance = ThreadIndex(); distance < Padded(); distance += kThreads) {
      const int diagonal = sequence_.k_len - 1 - distance;
      const float mass =
          diagonal < 0 ? 0.0f : MassOfDiagonal(params_, sequence_, head_, diagonal);
      StoreGlobal(masses_ + distance, mass);
    }
  }

  // Bits of a mass; forced ones are infinite. Sums of logits that are not finite, which
  // the run reports, count as 0.
  PBS_DEVICE uint32_t Bits(int index, uint32_t mass) const {
    if (index >= sequence_.k_len) return 0;
    if (index < forced_) return kInfinityBits;
    return mass > kInfinityBits ? 0 : mass;
  }

  // Masses whose bits are at least `bits`, which is above 0. Many loads are under way.
  PBS_DEVICE int CountFrom(uint32_t bits) {
    constexpr int kUnderWay = 4;
    int count = 0;
    PBS_NO_UNROLL
    for (int first = ThreadIndex() * 4; first < Padded();
         first += kUnderWay * 4 * kThreads) {
      Words4 masses[kUnderWay] = {};
      PBS_UNROLL
      for (int i = 0; i < kUnderWay; ++i) {
        const int index = first + i * 4 * kThreads;
        if (index < Padded()) {
          masses[i] = LoadGlobal(reinterpret_cast<const Words4*>(masses_ + index));
        }
      }
      PBS_UNROLL
      for (int i = 0; i < 4 * kUnderWay; ++i) {
        const int index = first + i / 4 * 4 * kThreads + i % 4;
        count += Bits(index, masses[i / 4].words[i % 4]) >= bits ? 1 : 0;
      }
    }
    return Tell(SumOfWarp(count)).total;
  }
  // Masses of whole blocks; those behind the last key or distance are 0.
  PBS_DEVICE int Padded() const { return sequence_.num_key_blocks * kBlockTokens; }

  // The `wanted` largest, at most all.
  PBS_DEVICE MassCut Cut(int wanted) {
    uint32_t least = 0;
    uint32_t above = kInfinityBits + 1;
    int num_above = 0;  // masses of at least `above`, fewer than wanted
    while (above - least > 1) {
      const uint32_t middle = least + (above - least) / 2;
      const int count = CountFrom(middle);
      if (count >= wanted) {
        least = middle;
      } else {
        above = middle;
        num_above = count;
      }
    }
    return {least, wanted - num_above};
  }

  // Writes a bit per index, and the chosen indices.
  PBS_DEVICE void Choose(const MassCut& cut, int wanted, uint32_t* bits_of_all,
                         int32_t* chosen) {
    constexpr int kBlockWords = kBlockTokens / 32;
    constexpr int kTie = 1 << 16;
    uint32_t* words = bits_of_all + first_block_ * kBlockWords;
    const uint32_t before = (1u << ThreadIndex() % 32) - 1;
    int larger_before = 0;
    int ties_before = 0;
    for (int first = 0; first < Padded(); first += kThreads) {
      const int index = first + ThreadIndex();
      const bool exists = index < sequence_.k_len;
      const uint32_t bits =
          exists ? Bits(index, FloatBits(LoadGlobal(masses_ + index))) : 0;
      const uint32_t larger = Ballot(exists && bits > cut.least);
      const uint32_t ties = Ballot(exists && bits == cut.least);
      const Told told = Tell(PopulationCount(larger) + PopulationCount(ties) * kTie);
      const int tie = ties_before + told.before / kTie + PopulationCount(ties & before);
      const int rank = larger_before + told.before % kTie +
                       PopulationCount(larger & before) +
                       (tie < cut.ties ? tie : cut.ties);
      const bool is_chosen =
          exists && rank < wanted &&
          (bits > cut.least || (bits == cut.least && tie < cut.ties));
      const uint32_t word = Ballot(is_chosen);
      if (ThreadIndex() % 32 == 0 && index < Padded())
        StoreGlobal(words + index / 32, word);
      if (is_chosen && chosen != nullptr) StoreGlobal(chosen + rank, index);
      larger_before += told.total % kTie;
      ties_before += told.total / kTie;
    }
  }

  // Sums over the warps: of those before this one, and of all. Each warp gives a value;
  // all threads call.
  struct Told {
    int before;
    int total;
  };
  PBS_DEVICE Told Tell(int value) {
    auto* sums = reinterpret_cast<int32_t*>(SharedMemory()) + turn_ * kWarps;
    turn_ ^= 1;  // the next call does not overwrite what a slower warp still reads
    const int warp = ThreadIndex() / 32;
    if (ThreadIndex() % 32 == 0) StoreShared(sums + warp, value);
    SyncThreads();
    Told told{0, 0};
    for (int i = 0; i < kWarps; ++i) {
      const int of_warp = LoadShared(sums + i);
      told.total += of_warp;
      if (i < warp) told.before += of_warp;
    }
    return told;
  }

  const SelectionParams& params_;
  const int head_;
  const SequenceRecord sequence_;
  const int64_t first_block_;  // of the head's key blocks
  float* masses_ = nullptr;
  int forced_ = 0;
  int turn_ = 0;
};

}  // namespace pbs::cuda
