// Cosines and sines of rotary position embedding.
#pragma once

#include <cstdint>

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

struct MakeRotationsParams {
  const double* frequencies;  // [pairs]
  float* cosines;             // [rows, pairs]
  float* sines;
  double factor;
  int64_t first_position;
  int32_t rows;
  int32_t pairs;
};

struct Rotation {
  double cosine;
  double sine;
};

// Cosine and sine for |angle| < 2^20, with an error of about 1e-14. Multiples of pi / 2
// are subtracted in two parts, of which the first has 33 bits, so that its multiples
// are exact (Cody and Waite).
PBS_DEVICE Rotation RotationOf(double angle) {
  constexpr double kTwoOverPi = 0.63661977236758134308;
  constexpr double kHalfPiHigh = 1.57079632673412561417;
  constexpr double kHalfPiLow = 6.07710050650619224932e-11;
  const double quarters = Round(angle * kTwoOverPi);
  const double x = (angle - quarters * kHalfPiHigh) - quarters * kHalfPiLow;
  const double z = x * x;
  // Taylor series on |x| <= pi / 4: the next terms are below 1e-16.
  double sine = -1.0 / 1307674368000.0;
  sine = sine * z + 1.0 / 6227020800.0;
  sine = sine * z - 1.0 / 39916800.0;
  sine = sine * z + 1.0 / 362880.0;
  sine = sine * z - 1.0 / 5040.0;
  sine = sine * z + 1.0 / 120.0;
  sine = sine * z - 1.0 / 6.0;
  sine = x + x * z * sine;
  double cosine = 1.0 / 20922789888000.0;
  cosine = cosine * z - 1.0 / 87178291200.0;
  cosine = cosine * z + 1.0 / 479001600.0;
  cosine = cosine * z - 1.0 / 3628800.0;
  cosine = cosine * z + 1.0 / 40320.0;
  cosine = cosine * z - 1.0 / 720.0;
  cosine = cosine * z + 1.0 / 24.0;
  cosine = cosine * z - 0.5;
  cosine = 1.0 + z * cosine;
  switch (static_cast<int32_t>(quarters) & 3) {
    case 0:
      return {cosine, sine};
    case 1:
      return {-sine, cosine};
    case 2:
      return {-cosine, -sine};
    default:
      return {sine, -cosine};
  }
}

// Grid [ceil(rows * pairs / kThreads)].
struct MakeRotations {
  static constexpr int kThreads = 128;

  static constexpr int64_t Blocks(const MakeRotationsParams& params) {
    return (int64_t{params.rows} * params.pairs + kThreads - 1) / kThreads;
  }

  PBS_DEVICE static void Run(const MakeRotationsParams& params) {
    const int64_t at = int64_t{BlockIndex()} * kThreads + ThreadIndex();
    const int64_t row = at / params.pairs;
    if (row >= params.rows) return;
    const double position = static_cast<double>(params.first_position + row);
    const Rotation rotation =
        RotationOf(position * LoadGlobal(params.frequencies + at % params.pairs));
    StoreGlobal(params.cosines + at,
                static_cast<float>(rotation.cosine * params.factor));
    StoreGlobal(params.sines + at, static_cast<float>(rotation.sine * params.factor));
  }
};

}  // namespace pbs::cuda
