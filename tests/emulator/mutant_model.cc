// The model path's kernels of this build (mutant_check.h): each against plain f64
// loops, where rows, heads and blocks end inside a group of threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/model/model_launches.h"
#include "emulator/device_array.h"

namespace pbs::emulator {
namespace {

using Values = std::vector<double>;

// Normal values in f32 or bf16 on the device, and the same as f64.
class Array {
 public:
  Array(DType dtype, int64_t count, uint32_t seed, double spread = 1)
      : dtype_(dtype), stored_(count * DTypeBytes(dtype), true) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0, spread);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& x : values) x = static_cast<float>(normal(random));
    ConvertElements(values.data(), DType::kF32, stored_.data(), dtype, count);
    stored_.Allow();
    exact = Read();
  }
  // That nothing has written yet.
  Array(DType dtype, int64_t count)
      : dtype_(dtype), stored_(count * DTypeBytes(dtype)) {
    stored_.Allow();
  }

  Values Read() const {
    std::vector<float> values(
        static_cast<size_t>(stored_.bytes() / DTypeBytes(dtype_)));
    ConvertElements(stored_.data(), dtype_, values.data(), DType::kF32,
                    static_cast<int64_t>(values.size()));
    return {values.begin(), values.end()};
  }
  void* data() { return stored_.data(); }
  float* f32() { return reinterpret_cast<float*>(stored_.data()); }

  Values exact;

 private:
  DType dtype_;
  DeviceArray<std::byte> stored_;
};

// Whether values are the exact ones, up to `error` of the largest.
bool Same(const char* what, const Values& actual, const Values& exact, double error) {
  double largest = 0;
  for (double x : exact) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < exact.size(); ++i) {
    // Not "greater": NaN is wrong too.
    if (!(std::abs(actual[i] - exact[i]) <= error * largest)) {
      std::printf("%s: %g at %zu, not %g\n", what, actual[i], i, exact[i]);
      return false;
    }
  }
  return true;
}

bool RanClean(const EmulatorLauncher& launch) {
  if (!launch.fault.ok()) std::printf("%s\n", launch.fault.ToString().c_str());
  return launch.fault.ok();
}

constexpr double kF32Error = 0x1p-20;
constexpr double kBf16Error = 0x1p-8;

bool MovesRows() {
  constexpr int64_t kCols = 520;
  Array source(DType::kBF16, 3 * kCols, 1);
  Array target(DType::kF32, 2 * kCols);
  DeviceArray<int32_t> index(2, true);
  index.data()[0] = 2;
  index.data()[1] = 0;
  index.Allow();
  EmulatorLauncher launch;
  cuda::EnqueueCopyRows({.source = source.data(),
                         .source_dtype = DType::kBF16,
                         .row_index = index.data(),
                         .rows = 2,
                         .cols = kCols,
                         .target = target.data()},
                        launch);
  Values exact(source.exact.begin() + 2 * kCols, source.exact.end());
  exact.insert(exact.end(), source.exact.begin(), source.exact.begin() + kCols);
  return RanClean(launch) && Same("moved", target.Read(), exact, 0);
}

bool NormalizesRows() {
  constexpr int64_t kCols = 1032;
  Array x(DType::kF32, 2 * kCols, 2);
  Array weight(DType::kF32, kCols, 3);
  Array y(DType::kF32, 2 * kCols);
  EmulatorLauncher launch;
  cuda::EnqueueRmsNorm({.x = x.f32(),
                        .weight = weight.f32(),
                        .epsilon = 0.5f,
                        .rows = 2,
                        .cols = kCols,
                        .y = y.data()},
                       launch);
  Values exact;
  for (int64_t row = 0; row < 2; ++row) {
    const double* at = x.exact.data() + row * kCols;
    double squares = 0;
    for (int64_t i = 0; i < kCols; ++i) squares += at[i] * at[i];
    for (int64_t i = 0; i < kCols; ++i) {
      exact.push_back(at[i] * weight.exact[i] / std::sqrt(squares / kCols + 0.5));
    }
  }
  return RanClean(launch) && Same("normalised", y.Read(), exact, kF32Error);
}

bool MakesRotations() {
  constexpr int64_t kRows = 5;
  constexpr int64_t kPairs = 32;
  constexpr int64_t kFirst = 131'070;
  DeviceArray<double> frequencies(kPairs, true);
  for (int64_t i = 0; i < kPairs; ++i) {
    frequencies.data()[i] = std::pow(1e4, -static_cast<double>(i) / kPairs);
  }
  frequencies.Allow();
  Array cosines(DType::kF32, kRows * kPairs);
  Array sines(DType::kF32, kRows * kPairs);
  EmulatorLauncher launch;
  cuda::EnqueueRotations({.frequencies = frequencies.data(),
                          .factor = 1.5,
                          .first_position = kFirst,
                          .rows = kRows,
                          .pairs = kPairs,
                          .cosines = cosines.f32(),
                          .sines = sines.f32()},
                         launch);
  Values cosine, sine;
  for (int64_t i = 0; i < kRows * kPairs; ++i) {
    const auto position = static_cast<double>(kFirst + i / kPairs);
    cosine.push_back(1.5 * std::cos(position * frequencies.data()[i % kPairs]));
    sine.push_back(1.5 * std::sin(position * frequencies.data()[i % kPairs]));
  }
  return RanClean(launch) && Same("cosines", cosines.Read(), cosine, 1e-7) &&
         Same("sines", sines.Read(), sine, 1e-7);
}

bool GatesRows() {
  constexpr int64_t kCols = 1032;
  constexpr int64_t kStride = 1040;
  Array gate_up(DType::kF32, 2 * 2 * kCols, 4);
  Array bias(DType::kF32, 2 * kCols, 5);
  Array y(DType::kF32, 2 * kStride);
  EmulatorLauncher launch;
  launch.Run<cuda::GateRows>(
      2, 0,
      cuda::GateRowsParams{.gate_up = gate_up.data(),
                           .bias = bias.f32(),
                           .y = y.data(),
                           .quads = kCols / cuda::kQuad,
                           .y_stride_quads = kStride / cuda::kQuad,
                           .dtype = DType::kF32});
  const Values padded = y.Read();
  Values actual, exact;
  for (int64_t i = 0; i < 2 * kCols; ++i) {
    const double* row = gate_up.exact.data() + i / kCols * 2 * kCols;
    const int64_t col = i % kCols;
    const double gate = row[col] + bias.exact[col];
    exact.push_back(gate / (1 + std::exp(-gate)) *
                    (row[kCols + col] + bias.exact[kCols + col]));
    actual.push_back(padded[i / kCols * kStride + col]);
  }
  return RanClean(launch) && Same("gated", actual, exact, kF32Error);
}

bool MultipliesRows() {
  constexpr int64_t kRows = 9;
  constexpr int64_t kHidden = 136;
  constexpr int64_t kVocab = 5;
  Array x(DType::kF32, kRows * kHidden, 6);
  Array weight(DType::kBF16, kVocab * kHidden, 7);
  Array y(DType::kF32, kRows * kVocab);
  EmulatorLauncher launch;
  cuda::EnqueueLogits({.x = x.f32(),
                       .weight = weight.data(),
                       .weight_dtype = DType::kBF16,
                       .rows = kRows,
                       .hidden = kHidden,
                       .vocab = kVocab,
                       .y = y.f32()},
                      launch);
  Values exact(kRows * kVocab);
  for (int64_t i = 0; i < kRows * kVocab; ++i) {
    for (int64_t j = 0; j < kHidden; ++j) {
      exact[i] +=
          x.exact[i / kVocab * kHidden + j] * weight.exact[i % kVocab * kHidden + j];
    }
  }
  return RanClean(launch) && Same("logits", y.Read(), exact, kF32Error);
}

struct SplitSetting {
  int32_t head_dim, num_heads, num_kv_heads;
  int64_t rows;
  int32_t row_in_block;
  bool pools;

  int64_t width() const { return (num_heads + 2 * int64_t{num_kv_heads}) * head_dim; }
  int64_t capacity() const { return rows + 3; }
  int64_t blocks() const { return (row_in_block + rows + 127) / 128; }
};

// What a layer's projection becomes, exactly.
struct SplitHeadsOf {
  SplitHeadsOf(const SplitSetting& s, const Array& qkv, const Array& q_norm,
               const Array& k_norm, const Array& cosines, const Array& sines)
      : queries(static_cast<size_t>(s.rows * s.num_heads * s.head_dim)),
        keys(static_cast<size_t>(s.num_kv_heads * s.capacity() * s.head_dim)),
        values(keys.size()) {
    const int64_t dim = s.head_dim;
    const int64_t half = dim / 2;
    for (int64_t at = 0; at < s.rows * s.width(); at += dim) {
      const int64_t row = at / s.width();
      const int64_t head = at % s.width() / dim;
      const double* x = qkv.exact.data() + at;
      const int64_t kv_head = (head - s.num_heads) % s.num_kv_heads;
      const int64_t cached = (kv_head * s.capacity() + row) * dim;
      if (head >= s.num_heads + s.num_kv_heads) {
        std::copy_n(x, dim, values.begin() + cached);
        continue;
      }
      const bool query = head < s.num_heads;
      const Values& norm = query ? q_norm.exact : k_norm.exact;
      double squares = 0;
      for (int64_t i = 0; i < dim; ++i) squares += x[i] * x[i];
      const double factor = 1 / std::sqrt(squares / static_cast<double>(dim) + 0.5);
      double* target = query ? queries.data() + (row * s.num_heads + head) * dim
                             : keys.data() + cached;
      for (int64_t i = 0; i < half; ++i) {
        const double a = x[i] * factor * norm[i];
        const double b = x[i + half] * factor * norm[i + half];
        const double cosine = cosines.exact[row * half + i];
        const double sine = sines.exact[row * half + i];
        target[i] = a * cosine - b * sine;
        target[i + half] = b * cosine + a * sine;
      }
    }
  }

  Values queries, keys, values;  // keys and values behind the rows are 0
};

bool SplitsHeads(const SplitSetting& s) {
  const int64_t cols = int64_t{s.num_heads} * s.head_dim;
  const int64_t cached = s.num_kv_heads * s.capacity() * s.head_dim;
  Array qkv(DType::kBF16, s.rows * s.width(), 8);
  Array q_norm(DType::kF32, s.head_dim, 9);
  Array k_norm(DType::kF32, s.head_dim, 10);
  Array cosines(DType::kF32, s.rows * s.head_dim / 2, 11);
  Array sines(DType::kF32, s.rows * s.head_dim / 2, 12);
  Array q(DType::kBF16, s.rows * cols);
  Array k(DType::kBF16, cached, 13, 0);
  Array v(DType::kBF16, cached, 14, 0);
  Array means(DType::kF32, s.blocks() * cols);
  EmulatorLauncher launch;
  cuda::EnqueueQkv({.qkv = qkv.data(),
                    .qkv_dtype = DType::kBF16,
                    .rows = s.rows,
                    .num_heads = s.num_heads,
                    .num_kv_heads = s.num_kv_heads,
                    .head_dim = s.head_dim,
                    .q_norm = q_norm.f32(),
                    .k_norm = k_norm.f32(),
                    .epsilon = 0.5f,
                    .cosines = cosines.f32(),
                    .sines = sines.f32(),
                    .kv_dtype = DType::kBF16,
                    .q = q.data(),
                    .k = k.data(),
                    .v = v.data(),
                    .kv_head_stride = s.capacity() * s.head_dim,
                    .pooled_queries = s.pools ? means.f32() : nullptr,
                    .block_size = 128,
                    .row_in_block = s.row_in_block},
                   launch);
  const SplitHeadsOf exact(s, qkv, q_norm, k_norm, cosines, sines);
  const Values queries = q.Read();
  if (!RanClean(launch) || !Same("queries", queries, exact.queries, kBf16Error) ||
      !Same("keys", k.Read(), exact.keys, kBf16Error) ||
      !Same("values", v.Read(), exact.values, 0)) {
    return false;
  }
  if (!s.pools) return true;
  // Of the queries as they were stored: rounding is not forgiven.
  Values exact_means(static_cast<size_t>(s.blocks() * cols));
  for (int64_t i = 0; i < s.rows * cols; ++i) {
    exact_means[(i / cols + s.row_in_block) / 128 * cols + i % cols] +=
        queries[i] / 128;
  }
  return Same("means", means.Read(), exact_means, kF32Error);
}

}  // namespace
}  // namespace pbs::emulator

int main() {
  using namespace pbs::emulator;  // NOLINT
  const bool right =
      MovesRows() && NormalizesRows() && MakesRotations() && GatesRows() &&
      MultipliesRows() && SplitsHeads({96, 4, 2, 3, 0, false}) &&
      SplitsHeads({96, 1, 1, 40, 100, true}) && SplitsHeads({64, 5, 1, 130, 100, true});
  return right ? 0 : 1;
}
