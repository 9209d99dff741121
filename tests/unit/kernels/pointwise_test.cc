// Spec: kernels/cpu/pointwise_kernels.h. Every table against plain f64 loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/pointwise.h"
#include "pbs/dtype.h"

namespace pbs::cpu {
namespace {

constexpr Isa kTables[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512};
constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
// One element, one register of each table, and what is left over around them.
constexpr int64_t kCounts[] = {1, 3, 4, 8, 15, 16, 17, 33, 64, 100, 2049};

Element ElementOf(DType dtype) { return static_cast<Element>(dtype); }

// Values in `dtype`, and the same as f64.
struct Row {
  std::vector<uint8_t> stored;
  std::vector<double> exact;
  const float* f32() const { return reinterpret_cast<const float*>(stored.data()); }
};

Row RandomRow(DType dtype, int64_t count, uint32_t seed, float spread = 2.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  Row row;
  row.stored.resize(static_cast<size_t>(count * DTypeBytes(dtype)));
  std::vector<float> values(static_cast<size_t>(count));
  for (float& x : values) x = normal(random);
  ConvertElements(values.data(), DType::kF32, row.stored.data(), dtype, count);
  ConvertElements(row.stored.data(), dtype, values.data(), DType::kF32, count);
  row.exact.assign(values.begin(), values.end());
  return row;
}

std::vector<float> Floats(const std::vector<uint8_t>& stored, DType dtype) {
  const auto count = static_cast<int64_t>(stored.size()) / DTypeBytes(dtype);
  std::vector<float> values(static_cast<size_t>(count));
  ConvertElements(stored.data(), dtype, values.data(), DType::kF32, count);
  return values;
}

// Half an ulp of the stored type, and a few f32 roundings before it.
double Relative(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 8 * 0x1p-24;
    case DType::kF16:
      return 0x1p-11 + 8 * 0x1p-24;
    case DType::kBF16:
      return 0x1p-8 + 8 * 0x1p-24;
  }
  return 0;
}

double InverseRms(const std::vector<double>& x, double epsilon) {
  double sum = 0;
  for (double value : x) sum += value * value;
  return 1 / std::sqrt(sum / static_cast<double>(x.size()) + epsilon);
}

class PointwiseSpec : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (!IsSupported(GetParam())) {
      GTEST_SKIP() << "pointwise " << IsaName(GetParam())
                   << " NOT RUN (this CPU lacks it)";
    }
  }
  const PointwiseKernels& kernels() const { return PointwiseFor(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Tables, PointwiseSpec, testing::ValuesIn(kTables),
                         [](const auto& param) { return IsaName(param.param); });

TEST_P(PointwiseSpec, WidensEveryHalfPrecisionValueExactly) {
  std::vector<uint16_t> halves(0x10000);
  for (uint32_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> expected(halves.size());
  std::vector<float> actual(halves.size());
  for (DType dtype : {DType::kF16, DType::kBF16}) {
    SCOPED_TRACE(DTypeName(dtype));
    ConvertElements(halves.data(), dtype, expected.data(), DType::kF32, 0x10000);
    kernels().widen(halves.data(), ElementOf(dtype), actual.data(), 0x10000);
    EXPECT_EQ(std::memcmp(expected.data(), actual.data(), 4 * expected.size()), 0);
  }
}

TEST_P(PointwiseSpec, NarrowsAsTheScalarConversionsDo) {
  // Every 4099th bit pattern: all exponents, NaNs and infinities included.
  std::vector<float> values;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 4099) {
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  for (float x : {0.0f, -0.0f, INFINITY, -INFINITY, 65504.0f, 65520.0f, 0x1p-25f}) {
    values.push_back(x);
  }
  const auto count = static_cast<int64_t>(values.size());
  for (DType dtype : {DType::kF16, DType::kBF16}) {
    SCOPED_TRACE(DTypeName(dtype));
    std::vector<uint16_t> expected(values.size());
    std::vector<uint16_t> actual(values.size());
    ConvertElements(values.data(), DType::kF32, expected.data(), dtype, count);
    kernels().narrow(values.data(), actual.data(), ElementOf(dtype), count);
    EXPECT_EQ(expected, actual);
  }
}

TEST_P(PointwiseSpec, NormalisesRowsOfAnyLength) {
  for (DType dtype : kDTypes) {
    for (int64_t count : kCounts) {
      SCOPED_TRACE(std::string(DTypeName(dtype)) + " count " + std::to_string(count));
      const Row x = RandomRow(DType::kF32, count, 1);
      const Row weight = RandomRow(DType::kF32, count, 2);
      std::vector<uint8_t> y(static_cast<size_t>(count * DTypeBytes(dtype)));
      kernels().rms_norm(x.f32(), weight.f32(), 1e-5f, count, y.data(),
                         ElementOf(dtype));
      const double factor = InverseRms(x.exact, 1e-5);
      const std::vector<float> actual = Floats(y, dtype);
      for (int64_t i = 0; i < count; ++i) {
        const double expected = x.exact[i] * factor * weight.exact[i];
        EXPECT_NEAR(actual[i], expected,
                    Relative(dtype) * std::abs(expected) + 0x1p-24);
      }
    }
  }
}

TEST_P(PointwiseSpec, RotatesPairsHalfAHeadApart) {
  for (DType from : {DType::kF32, DType::kBF16}) {
    for (DType to : kDTypes) {
      for (int64_t dim : {32, 64, 96, 128, 256}) {
        SCOPED_TRACE(std::string(DTypeName(from)) + " to " + DTypeName(to) + " dim " +
                     std::to_string(dim));
        const Row x = RandomRow(from, dim, 3);
        const Row cosines = RandomRow(DType::kF32, dim / 2, 4, 0.5f);
        const Row sines = RandomRow(DType::kF32, dim / 2, 5, 0.5f);
        const Row norm = RandomRow(DType::kF32, dim, 6);
        for (const float* weight : {static_cast<const float*>(nullptr), norm.f32()}) {
          std::vector<uint8_t> y(static_cast<size_t>(dim * DTypeBytes(to)));
          kernels().rotate_head(x.stored.data(), ElementOf(from), weight, 1e-6f,
                                cosines.f32(), sines.f32(), dim, y.data(),
                                ElementOf(to));
          const std::vector<float> actual = Floats(y, to);
          const double factor = weight == nullptr ? 1.0 : InverseRms(x.exact, 1e-6);
          for (int64_t i = 0; i < dim; ++i) {
            const int64_t j = i < dim / 2 ? i + dim / 2 : i - dim / 2;
            const auto value = [&](int64_t at) {
              return x.exact[at] * factor * (weight == nullptr ? 1.0 : norm.exact[at]);
            };
            const int64_t pair = std::min(i, j);
            const double sign = i < j ? -1.0 : 1.0;
            const double a = value(i) * cosines.exact[pair];
            const double b = sign * value(j) * sines.exact[pair];
            EXPECT_NEAR(actual[i], a + b,
                        Relative(to) * std::abs(a + b) +
                            4 * 0x1p-24 * (std::abs(a) + std::abs(b)) + 0x1p-24);
          }
        }
      }
    }
  }
}

TEST_P(PointwiseSpec, EndsLinearLayersWithAndWithoutBias) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int64_t count : kCounts) {
      SCOPED_TRACE(std::string(DTypeName(dtype)) + " count " + std::to_string(count));
      const Row sums = RandomRow(DType::kF32, count, 7);
      const Row bias = RandomRow(DType::kF32, count, 8);
      const Row before = RandomRow(DType::kF32, count, 9);
      for (const float* b : {static_cast<const float*>(nullptr), bias.f32()}) {
        std::vector<uint8_t> stored(static_cast<size_t>(count * DTypeBytes(dtype)));
        std::vector<uint8_t> added = before.stored;
        kernels().store_sums(sums.f32(), b, count, stored.data(), ElementOf(dtype));
        kernels().add_sums(sums.f32(), b, count,
                           reinterpret_cast<float*>(added.data()));
        const std::vector<float> y = Floats(stored, dtype);
        const std::vector<float> z = Floats(added, DType::kF32);
        for (int64_t i = 0; i < count; ++i) {
          const double expected = sums.exact[i] + (b == nullptr ? 0.0 : bias.exact[i]);
          EXPECT_NEAR(y[i], expected, Relative(dtype) * std::abs(expected) + 0x1p-22);
          EXPECT_NEAR(z[i], before.exact[i] + expected, 0x1p-20);
        }
      }
    }
  }
}

TEST_P(PointwiseSpec, GatesBySiluOverTheWholeRangeOfFloats) {
  std::vector<float> gate = {0.0f,   -0.0f,  1.0f,     -1.0f,     20.0f, -20.0f,
                             88.0f,  -88.0f, 300.0f,   -300.0f,   1e30f, -1e30f,
                             1e-30f, 0.5f,   INFINITY, -INFINITY, NAN};
  for (float x = -90.0f; x < 90.0f; x += 0.37f) gate.push_back(x);
  const auto count = static_cast<int64_t>(gate.size());
  const std::vector<float> up(gate.size(), 1.5f);
  std::vector<float> y(gate.size());
  kernels().swiglu_sums(gate.data(), nullptr, up.data(), nullptr, count, y.data(),
                        Element::kF32);
  for (int64_t i = 0; i < count; ++i) {
    SCOPED_TRACE(gate[i]);
    const double g = gate[i];
    if (std::isnan(gate[i]) || gate[i] == -INFINITY) {
      EXPECT_FALSE(std::isfinite(y[i])) << "a broken activation must stay visible";
      continue;
    }
    const double expected = g / (1 + std::exp(-g)) * 1.5;
    if (std::isinf(expected)) {
      EXPECT_EQ(y[i], expected);
    } else {
      EXPECT_NEAR(y[i], expected,
                  8 * 0x1p-24 * std::abs(expected) + 1e-30 * std::abs(g));
    }
  }
}

TEST_P(PointwiseSpec, MultipliesRowsByAWeightAsItWasStored) {
  for (DType dtype : kDTypes) {
    for (int64_t depth : {1, 17, 64, 300}) {
      for (int64_t rows : {1, 2, 5}) {
        const int64_t cols = 7;
        SCOPED_TRACE(std::string(DTypeName(dtype)) + " depth " + std::to_string(depth) +
                     " rows " + std::to_string(rows));
        const Row x = RandomRow(DType::kF32, rows * depth, 10);
        const Row w = RandomRow(dtype, cols * depth, 11);
        std::vector<float> y(static_cast<size_t>(rows * (cols + 2)), -1.0f);
        kernels().row_dots(x.f32(), rows, w.stored.data(), ElementOf(dtype), cols,
                           depth, y.data(), cols + 2);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < cols; ++c) {
            double expected = 0;
            double magnitude = 0;
            for (int64_t i = 0; i < depth; ++i) {
              const double term = x.exact[r * depth + i] * w.exact[c * depth + i];
              expected += term;
              magnitude += std::abs(term);
            }
            EXPECT_NEAR(y[r * (cols + 2) + c], expected, 32 * 0x1p-24 * magnitude);
          }
          EXPECT_EQ(y[r * (cols + 2) + cols], -1.0f) << "wrote past its columns";
        }
      }
    }
  }
}

}  // namespace
}  // namespace pbs::cpu
