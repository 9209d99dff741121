// The divisors of the scores of bands (prism, arXiv 2602.08426). A band's logits are
// divided by the root of its width and by its temperature: its share in the root mean
// squares of all query means and of all key means of a head.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/stamp_time.h"
#include "cuda/tiles/warp_sums.h"

namespace pbs::cuda {

// Grid [num_heads, num_sequences], 512 threads. Dynamic shared memory: kSharedBytes.
// Sums are f64, because squares of f32 may pass the largest f32, and in a fixed order.
class MeasureBands {
 public:
  static constexpr int kThreads = 512;
  static constexpr int kWarps = kThreads / 32;

 private:
  // Sums of squares: of all columns, and of those of each band.
  struct Squares {
    double all;
    double band[kBands];
  };
  struct Parts {
    Squares queries;
    Squares keys;
  };

 public:
  static constexpr int kSharedBytes = kWarps * sizeof(Parts);

  PBS_DEVICE static void Run(const SelectionParams& params) {
    StampTime(params.ordered);
    MeasureBands(params, PlaceInGrid(params.num_sequences)).Run();
  }

 private:
  PBS_DEVICE MeasureBands(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        head_(place.head),
        sequence_index_(place.item),
        sequence_(LoadGlobal(params.sequences + place.item)) {}

  PBS_DEVICE void Run() {
    if (sequence_.sparse == 0) return;
    auto* parts = reinterpret_cast<Parts*>(SharedMemory());
    const Parts part = {SumOfWarps(SquaresOfQueries()), SumOfWarps(SquaresOfKeys())};
    if (ThreadIndex() % 32 == 0) StoreShared(parts + ThreadIndex() / 32, part);
    SyncThreads();
    const int band = ThreadIndex();
    if (band >= kBands) return;
    Sums queries = {};
    Sums keys = {};
    for (int warp = 0; warp < kWarps; ++warp) {
      queries.Add(&parts[warp].queries, band);
      keys.Add(&parts[warp].keys, band);
    }
    const double width = 2 * (params_.bands[band].end - params_.bands[band].begin);
    const double temperature = Sqrt(width / params_.head_dim) *
                               Share(queries, width, sequence_.num_query_blocks) *
                               Share(keys, width, sequence_.num_key_blocks);
    const double divisor = Sqrt(width) * temperature;
    // A band of zeros has logits of 0, not 0 / 0. A NaN stays one.
    StoreGlobal(params_.band_divisors +
                    (head_ * params_.num_sequences + sequence_index_) * kBands + band,
                static_cast<float>(divisor < 1e-30 ? 1e-30 : divisor));
  }

  // Of all warps: of all columns, and of those of one band.
  struct Sums {
    double all;
    double band;

    PBS_DEVICE void Add(const Squares* squares, int index) {
      all += LoadShared(&squares->all);
      band += LoadShared(&squares->band[index]);
    }
  };

  // Root mean square of the columns of a band, over that of all columns.
  PBS_DEVICE double Share(const Sums& sum, double width, int blocks) const {
    const double root = Sqrt(sum.all / (double{1} * blocks * params_.head_dim));
    return Sqrt(sum.band / (blocks * width)) / (root < 1e-6 ? 1e-6 : root);
  }

  PBS_DEVICE Squares SquaresOfQueries() const {
    const int64_t stride = int64_t{params_.num_heads} * params_.head_dim;
    const float* queries = params_.pooled_queries +
                           sequence_.query_block_begin * stride +
                           head_ * params_.head_dim;
    Squares sum = {};
    for (int i = ThreadIndex() / 32; i < sequence_.num_query_blocks; i += kWarps) {
      for (int d = ThreadIndex() % 32; d < params_.head_dim; d += 32) {
        Add(d, Square(LoadGlobal(queries + i * stride + d)), sum);
      }
    }
    return sum;
  }

  PBS_DEVICE Squares SquaresOfKeys() const {
    const int64_t order_head = head_ / Members(params_);
    const float* keys = params_.pooled_keys +
                        order_head * params_.head_dim * params_.total_key_blocks +
                        sequence_.key_block_begin;
    Squares sum = {};
    for (int d = ThreadIndex() / 32; d < params_.head_dim; d += kWarps) {
      const float* column = keys + int64_t{d} * params_.total_key_blocks;
      double squares = 0;
      for (int j = ThreadIndex() % 32; j < sequence_.num_key_blocks; j += 32) {
        squares += Square(LoadGlobal(column + j));
      }
      Add(d, squares, sum);
    }
    return sum;
  }

  PBS_DEVICE static double Square(float x) { return double{x} * double{x}; }

  PBS_DEVICE void Add(int column, double squares, Squares& sum) const {
    const int half = params_.head_dim / 2;
    const int pair = column < half ? column : column - half;
    sum.all += squares;
    PBS_UNROLL
    for (int band = 0; band < kBands; ++band) {
      const PairBand& pairs = params_.bands[band];
      if (pair >= pairs.begin && pair < pairs.end) sum.band[band] += squares;
    }
  }

  PBS_DEVICE static Squares SumOfWarps(const Squares& sum) {
    Squares all = {SumOfWarp(sum.all), {}};
    PBS_UNROLL
    for (int band = 0; band < kBands; ++band) {
      all.band[band] = SumOfWarp(sum.band[band]);
    }
    return all;
  }

  const SelectionParams& params_;
  const int head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
};

}  // namespace pbs::cuda
