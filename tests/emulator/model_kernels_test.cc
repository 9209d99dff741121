// Spec: cuda/model, every kernel on the emulator against plain f64 loops.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/model/model_launches.h"
#include "emulator/device_array.h"
#include "pbs/dtype.h"

namespace pbs::emulator {
namespace {

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

// A matrix of normal values in `dtype` on the device, and the same as f64.
class Matrix {
 public:
  Matrix(DType dtype, int64_t count, uint32_t seed, float spread = 2.0f)
      : dtype_(dtype), stored_(count * DTypeBytes(dtype), /*written=*/true) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, spread);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& x : values) x = normal(random);
    Set(values);
  }
  // Values that nothing has written yet.
  Matrix(DType dtype, int64_t count)
      : dtype_(dtype), stored_(count * DTypeBytes(dtype)) {
    stored_.Allow();
  }

  void Set(std::vector<float> values) {
    const auto count = static_cast<int64_t>(values.size());
    ConvertElements(values.data(), DType::kF32, stored_.data(), dtype_, count);
    ConvertElements(stored_.data(), dtype_, values.data(), DType::kF32, count);
    exact.assign(values.begin(), values.end());
    stored_.Allow();
  }
  std::vector<float> Read() const {
    const int64_t count = stored_.bytes() / DTypeBytes(dtype_);
    std::vector<float> values(static_cast<size_t>(count));
    ConvertElements(stored_.data(), dtype_, values.data(), DType::kF32, count);
    return values;
  }
  void* data() { return stored_.data(); }
  float* f32() { return reinterpret_cast<float*>(stored_.data()); }

  std::vector<double> exact;

 private:
  DType dtype_;
  DeviceArray<std::byte> stored_;
};

// Half an ulp of the stored type, and a few f32 roundings before it.
double Relative(DType dtype) {
  constexpr double kF32Roundings = 16 * 0x1p-24;
  if (dtype == DType::kF32) return kF32Roundings;
  return (dtype == DType::kF16 ? 0x1p-11 : 0x1p-8) + kF32Roundings;
}

double InverseRms(const double* x, int64_t count, double epsilon) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] * x[i];
  return 1 / std::sqrt(sum / static_cast<double>(count) + epsilon);
}

class ModelKernelsSpec : public testing::Test {
 protected:
  ~ModelKernelsSpec() override {
    EXPECT_TRUE(launch_.fault.ok()) << launch_.fault.ToString();
    GlobalMemory::Clear();
  }

  EmulatorLauncher launch_;
};

TEST_F(ModelKernelsSpec, MovesChosenRowsAndConvertsThem) {
  constexpr int64_t kCols = 520;  // more quads than threads
  const std::vector<int32_t> index = {4, 0, 4};
  DeviceArray<int32_t> rows(3, /*written=*/true);
  std::copy(index.begin(), index.end(), rows.data());
  rows.Allow();
  for (DType from : kDTypes) {
    for (DType to : kDTypes) {
      for (bool indexed : {false, true}) {
        SCOPED_TRACE(std::string(DTypeName(from)) + " to " + DTypeName(to));
        Matrix source(from, 5 * kCols, 1);
        Matrix target(to, 3 * kCols);
        cuda::EnqueueCopyRows({.source = source.data(),
                               .source_dtype = from,
                               .row_index = indexed ? rows.data() : nullptr,
                               .rows = 3,
                               .cols = kCols,
                               .target = target.data(),
                               .target_dtype = to},
                              launch_);
        const std::vector<float> actual = target.Read();
        for (int64_t i = 0; i < 3 * kCols; ++i) {
          const int64_t row = indexed ? index[i / kCols] : i / kCols;
          const double expected = source.exact[row * kCols + i % kCols];
          ASSERT_NEAR(actual[i], expected, Relative(to) * std::abs(expected)) << i;
        }
      }
    }
  }
}

TEST_F(ModelKernelsSpec, NormalisesRowsOfAnyLength) {
  for (DType dtype : kDTypes) {
    for (int64_t cols : {8, 64, 1032, 2056}) {
      SCOPED_TRACE(std::string(DTypeName(dtype)) + " cols " + std::to_string(cols));
      Matrix x(DType::kF32, 3 * cols, 1);
      Matrix weight(DType::kF32, cols, 2);
      Matrix y(dtype, 3 * cols);
      cuda::EnqueueRmsNorm({.x = x.f32(),
                            .weight = weight.f32(),
                            .epsilon = 1e-5f,
                            .rows = 3,
                            .cols = cols,
                            .y = y.data(),
                            .y_dtype = dtype},
                           launch_);
      const std::vector<float> actual = y.Read();
      for (int64_t i = 0; i < 3 * cols; ++i) {
        const double factor = InverseRms(x.exact.data() + i / cols * cols, cols, 1e-5);
        const double expected = x.exact[i] * factor * weight.exact[i % cols];
        ASSERT_NEAR(actual[i], expected, Relative(dtype) * std::abs(expected) + 0x1p-24)
            << i;
      }
    }
  }
}

TEST_F(ModelKernelsSpec, MakesRotationsOfAnyPosition) {
  constexpr int64_t kRows = 7;
  constexpr int64_t kPairs = 48;
  DeviceArray<double> frequencies(kPairs, /*written=*/true);
  for (int64_t i = 0; i < kPairs; ++i) {
    frequencies.data()[i] = std::pow(500000.0, -static_cast<double>(i) / kPairs);
  }
  frequencies.Allow();
  for (int64_t first : {0, 1, 131'070, 1'048'569}) {
    SCOPED_TRACE(first);
    Matrix cosines(DType::kF32, kRows * kPairs);
    Matrix sines(DType::kF32, kRows * kPairs);
    cuda::EnqueueRotations({.frequencies = frequencies.data(),
                            .factor = 1.25,
                            .first_position = first,
                            .rows = kRows,
                            .pairs = kPairs,
                            .cosines = cosines.f32(),
                            .sines = sines.f32()},
                           launch_);
    const std::vector<float> cosine = cosines.Read();
    const std::vector<float> sine = sines.Read();
    for (int64_t i = 0; i < kRows * kPairs; ++i) {
      const long double angle =
          static_cast<long double>(first + i / kPairs) * frequencies.data()[i % kPairs];
      ASSERT_NEAR(cosine[i], 1.25 * static_cast<double>(std::cos(angle)), 1e-7) << i;
      ASSERT_NEAR(sine[i], 1.25 * static_cast<double>(std::sin(angle)), 1e-7) << i;
    }
  }
}

struct Heads {
  int32_t dim;
  int32_t num_heads, num_kv_heads;
  bool norm;
};

// One call of SplitHeads, and what must come of it.
struct SplitCase {
  static constexpr int64_t kFirst = 4;  // position of the first row

  SplitCase(const Heads& of, DType from, DType to_dtype, int64_t num_rows = 3)
      : heads(of),
        to(to_dtype),
        rows(num_rows),
        qkv(from, rows * width(), 3),
        cosines(DType::kF32, rows * of.dim / 2, 4, 0.5f),
        sines(DType::kF32, rows * of.dim / 2, 5, 0.5f),
        q_norm(DType::kF32, of.dim, 6),
        k_norm(DType::kF32, of.dim, 7),
        q(to_dtype, rows * of.num_heads * of.dim),
        k(to_dtype, of.num_kv_heads * capacity() * of.dim),
        v(to_dtype, of.num_kv_heads * capacity() * of.dim),
        op{.qkv = qkv.data(),
           .qkv_dtype = from,
           .rows = rows,
           .num_heads = of.num_heads,
           .num_kv_heads = of.num_kv_heads,
           .head_dim = of.dim,
           .q_norm = of.norm ? q_norm.f32() : nullptr,
           .k_norm = of.norm ? k_norm.f32() : nullptr,
           .epsilon = 1e-6f,
           .cosines = cosines.f32(),
           .sines = sines.f32(),
           .kv_dtype = to_dtype,
           .q = q.data(),
           .k = AtFirst(k),
           .v = AtFirst(v),
           .kv_head_stride = capacity() * of.dim} {}

  int64_t capacity() const { return rows + 6; }
  int64_t width() const {
    return (heads.num_heads + 2 * int64_t{heads.num_kv_heads}) * heads.dim;
  }
  std::byte* AtFirst(Matrix& cache) const {
    return static_cast<std::byte*>(cache.data()) + kFirst * heads.dim * DTypeBytes(to);
  }

  // Of element i of a head that begins at x: exact, and what f32 rounds in.
  std::pair<double, double> Rotated(const double* x, int64_t row, int64_t i,
                                    const Matrix& norm) const {
    const int64_t half = heads.dim / 2;
    const double factor = heads.norm ? InverseRms(x, heads.dim, 1e-6) : 1.0;
    const auto value = [&](int64_t j) {
      return x[j] * factor * (heads.norm ? norm.exact[j] : 1.0);
    };
    const int64_t partner = i < half ? i + half : i - half;
    const int64_t pair = row * half + std::min(i, partner);
    const double a = value(i) * cosines.exact[pair];
    const double b = (i < half ? -1 : 1) * value(partner) * sines.exact[pair];
    return {a + b, std::abs(a) + std::abs(b)};
  }

  void Check() const {
    const std::vector<float> queries = q.Read();
    const std::vector<float> keys = k.Read();
    const std::vector<float> values = v.Read();
    for (int64_t at = 0; at < rows * width(); ++at) {
      const int64_t row = at / width();
      const int64_t head = at % width() / heads.dim;
      const int64_t i = at % heads.dim;
      const double* x = qkv.exact.data() + at - i;
      const int64_t kv_head = (head - heads.num_heads) % heads.num_kv_heads;
      const int64_t cached = (kv_head * capacity() + kFirst + row) * heads.dim + i;
      if (head >= heads.num_heads + heads.num_kv_heads) {
        ASSERT_NEAR(values[cached], x[i], Relative(to) * std::abs(x[i]));
        continue;
      }
      const bool query = head < heads.num_heads;
      const auto [expected, magnitude] = Rotated(x, row, i, query ? q_norm : k_norm);
      const double actual =
          query ? queries[(row * heads.num_heads + head) * heads.dim + i]
                : keys[cached];
      ASSERT_NEAR(actual, expected,
                  Relative(to) * std::abs(expected) + 0x1p-20 * magnitude + 0x1p-24)
          << "row " << row << " head " << head << " element " << i;
    }
  }

  // `means` holds, block by block, the sums of `q` as it was stored over 128.
  void CheckMeans(const std::vector<float>& means, int64_t row_in_block) const {
    const std::vector<float> queries = q.Read();
    const int64_t cols = int64_t{heads.num_heads} * heads.dim;
    std::vector<double> sums(means.size());
    std::vector<double> magnitudes(means.size());
    for (int64_t i = 0; i < rows * cols; ++i) {
      const int64_t at = (i / cols + row_in_block) / 128 * cols + i % cols;
      sums[at] += queries[i];
      magnitudes[at] += std::abs(queries[i]);
    }
    for (size_t i = 0; i < means.size(); ++i) {
      ASSERT_NEAR(means[i], sums[i] / 128, 0x1p-22 * magnitudes[i] / 128)
          << "block " << i / cols << " column " << i % cols;
    }
  }

  const Heads heads;
  const DType to;
  const int64_t rows;
  Matrix qkv, cosines, sines, q_norm, k_norm, q, k, v;
  QkvOp op;
};

TEST_F(ModelKernelsSpec, SplitsRotatesAndNormalisesHeads) {
  for (const Heads& heads :
       {Heads{32, 2, 1, false}, Heads{64, 4, 2, true}, Heads{96, 3, 3, true},
        Heads{96, 3, 1, false}, Heads{128, 5, 1, true}, Heads{256, 2, 2, true}}) {
    for (DType from : kDTypes) {
      for (DType to : {DType::kF16, DType::kBF16}) {
        SCOPED_TRACE("dim " + std::to_string(heads.dim) + " " + DTypeName(from) +
                     " to " + DTypeName(to));
        const SplitCase split(heads, from, to);
        cuda::EnqueueQkv(split.op, launch_);
        split.Check();
      }
    }
  }
}

// Blocks that begin before the first row and end behind the last, whole ones, and a
// group of heads of which only some are queries.
TEST_F(ModelKernelsSpec, PoolsBlocksOfQueriesOnTheWay) {
  struct Place {
    Heads heads;
    int64_t rows;
    int32_t row_in_block;
  };
  for (const Place& place :
       {Place{{64, 4, 2, true}, 300, 0}, Place{{64, 5, 1, false}, 30, 90},
        Place{{96, 3, 3, true}, 130, 100}, Place{{128, 5, 1, true}, 129, 0},
        Place{{128, 1, 1, false}, 1, 127}, Place{{256, 2, 2, true}, 200, 3}}) {
    for (DType to : {DType::kF16, DType::kBF16}) {
      SCOPED_TRACE("dim " + std::to_string(place.heads.dim) + " to " + DTypeName(to));
      SplitCase split(place.heads, DType::kBF16, to, place.rows);
      const int64_t blocks = (place.row_in_block + place.rows + 127) / 128;
      Matrix means(DType::kF32, blocks * place.heads.num_heads * place.heads.dim);
      split.op.pooled_queries = means.f32();
      split.op.block_size = 128;
      split.op.row_in_block = place.row_in_block;
      cuda::EnqueueQkv(split.op, launch_);
      split.Check();
      split.CheckMeans(means.Read(), place.row_in_block);
    }
  }
}

TEST_F(ModelKernelsSpec, GatesBySiluOverTheWholeRangeOfFloats) {
  constexpr int64_t kCols = 1032;
  constexpr int64_t kStride = 1040;
  for (DType dtype : kDTypes) {
    for (bool biased : {false, true}) {
      SCOPED_TRACE(DTypeName(dtype));
      Matrix gate_up(dtype, 2 * 2 * kCols, 8, 10.0f);
      std::vector<float> values = gate_up.Read();
      const float extremes[] = {0.0f, 300.0f, -300.0f, 3e3f, -3e3f, -88.0f, 1e-6f};
      std::copy(std::begin(extremes), std::end(extremes), values.begin());
      std::fill_n(values.begin() + kCols, std::size(extremes), 1.5f);
      gate_up.Set(values);
      Matrix bias(DType::kF32, 2 * kCols, 9);
      Matrix y(dtype, 2 * kStride);
      launch_.Run<cuda::GateRows>(
          2, 0,
          cuda::GateRowsParams{.gate_up = gate_up.data(),
                               .bias = biased ? bias.f32() : nullptr,
                               .y = y.data(),
                               .quads = kCols / cuda::kQuad,
                               .y_stride_quads = kStride / cuda::kQuad,
                               .dtype = dtype});
      const std::vector<float> actual = y.Read();
      for (int64_t i = 0; i < 2 * kCols; ++i) {
        const int64_t row = i / kCols;
        const int64_t col = i % kCols;
        const double* x = gate_up.exact.data() + row * 2 * kCols;
        const double gate = x[col] + (biased ? bias.exact[col] : 0);
        const double up = x[kCols + col] + (biased ? bias.exact[kCols + col] : 0);
        const double expected = gate / (1 + std::exp(-gate)) * up;
        // Below f16's normal numbers steps no longer shrink.
        const double least = dtype == DType::kF16 ? 0x1p-25 : 1e-30;
        ASSERT_NEAR(actual[row * kStride + col], expected,
                    (Relative(dtype) + 0x1p-18) * std::abs(expected) + least)
            << i;
      }
    }
  }
}

TEST_F(ModelKernelsSpec, KeepsABrokenActivationVisible) {
  const std::vector<float> gates = {NAN, -INFINITY, 1.0f, 2.0f};
  Matrix gate_up(DType::kF32, 8, 1);
  std::vector<float> values = gates;
  values.insert(values.end(), 4, 1.5f);
  gate_up.Set(values);
  Matrix y(DType::kF32, 4);
  launch_.Run<cuda::GateRows>(1, 0,
                              cuda::GateRowsParams{.gate_up = gate_up.data(),
                                                   .bias = nullptr,
                                                   .y = y.data(),
                                                   .quads = 1,
                                                   .y_stride_quads = 1,
                                                   .dtype = DType::kF32});
  EXPECT_FALSE(std::isfinite(y.Read()[0]));
  EXPECT_FALSE(std::isfinite(y.Read()[1]));
}

TEST_F(ModelKernelsSpec, MultipliesRowsByAWeightAsItWasStored) {
  for (DType dtype : kDTypes) {
    for (int64_t hidden : {8, 64, 136}) {
      for (int64_t rows : {1, 8, 19}) {
        constexpr int64_t kVocab = 13;  // no multiple of a block's warps
        SCOPED_TRACE(std::string(DTypeName(dtype)) + " hidden " +
                     std::to_string(hidden) + " rows " + std::to_string(rows));
        Matrix x(DType::kF32, rows * hidden, 10);
        Matrix weight(dtype, kVocab * hidden, 11);
        Matrix y(DType::kF32, rows * kVocab);
        cuda::EnqueueLogits({.x = x.f32(),
                             .weight = weight.data(),
                             .weight_dtype = dtype,
                             .rows = rows,
                             .hidden = hidden,
                             .vocab = kVocab,
                             .y = y.f32()},
                            launch_);
        const std::vector<float> actual = y.Read();
        for (int64_t i = 0; i < rows * kVocab; ++i) {
          double expected = 0;
          double magnitude = 0;
          for (int64_t j = 0; j < hidden; ++j) {
            const double term = x.exact[i / kVocab * hidden + j] *
                                weight.exact[i % kVocab * hidden + j];
            expected += term;
            magnitude += std::abs(term);
          }
          ASSERT_NEAR(actual[i], expected, 32 * 0x1p-24 * magnitude) << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace pbs::emulator
