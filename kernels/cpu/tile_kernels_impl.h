// The body of every tile-kernel table. One file per ISA defines `Vec` (W f32 lanes),
// the tile constants and the conversions, then includes this header inside its
// anonymous namespace. See tile_kernels.h.
//
// Vec must offer: kLanes, Load, Store, Set1, Zero, Fma(a, b, c) = a * b + c, Add, Sub,
// Mul, Div, Max, HorizontalMax, HorizontalAdd, Exp2 (2^x for x <= 0, exactly 0 below
// -126, NaN for NaN), and KeepSeen(scores, positions, last) = positions <= last ?
// scores : -inf. kTileRows x kTileVecs is the register tile.

#define PBS_UNROLL _Pragma("GCC unroll 16")

constexpr int32_t kPanelWidth = kTileVecs * Vec::kLanes;

// c[kRows, kVecs * lanes] (+)= a[kRows, depth] b[depth, kVecs * lanes]
template <int kRows, int kVecs>
inline void GemmTile(int32_t depth, const float* a, int64_t a_stride, const float* b,
                     float* c, int64_t c_stride, bool accumulate) {
  Vec acc[kRows][kVecs];
  PBS_UNROLL for (int r = 0; r < kRows; ++r) {
    PBS_UNROLL for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::Zero();
  }
  // An accumulating product sums keys from the last to the first. A permuted segment
  // has its largest weights first, and a sum that adds them last rounds less.
  const int64_t step = accumulate ? -1 : 1;
  const float* a_at = a + (accumulate ? depth - 1 : 0);
  const float* b_at = b + (accumulate ? depth - 1 : 0) * int64_t{kVecs * Vec::kLanes};
  for (int32_t k = 0; k < depth; ++k) {
    Vec column[kVecs];
    PBS_UNROLL for (int v = 0; v < kVecs; ++v) {
      column[v] = Vec::Load(b_at + v * Vec::kLanes);
    }
    PBS_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec x = Vec::Set1(a_at[r * a_stride]);
      PBS_UNROLL for (int v = 0; v < kVecs; ++v) {
        acc[r][v] = Vec::Fma(x, column[v], acc[r][v]);
      }
    }
    a_at += step;
    b_at += step * (kVecs * Vec::kLanes);
  }
  // Adding to c at the end sums block by block, which rounds less than one chain.
  PBS_UNROLL for (int r = 0; r < kRows; ++r) {
    PBS_UNROLL for (int v = 0; v < kVecs; ++v) {
      float* at = c + r * c_stride + v * Vec::kLanes;
      if (accumulate) acc[r][v] = Vec::Add(acc[r][v], Vec::Load(at));
      acc[r][v].Store(at);
    }
  }
}

// Rows kRows at a time, then the rest with one tile of exactly that height.
template <int kRows, int kVecs>
void GemmPanel(int32_t rows, int32_t depth, const float* a, int64_t a_stride,
               const float* b, float* c, int64_t c_stride, bool accumulate) {
  int32_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    GemmTile<kRows, kVecs>(depth, a + row * a_stride, a_stride, b, c + row * c_stride,
                           c_stride, accumulate);
  }
  if constexpr (kRows > 1) {
    if (row < rows) {
      GemmPanel<kRows - 1, kVecs>(rows - row, depth, a + row * a_stride, a_stride, b,
                                  c + row * c_stride, c_stride, accumulate);
    }
  }
}

template <int kVecs>
void GemmLastPanel(const Product& x, int32_t col, int32_t width, const uint32_t* b) {
  if (width == kVecs * Vec::kLanes) {
    GemmPanel<kTileRows, kVecs>(x.rows, x.depth, reinterpret_cast<const float*>(x.a),
                                x.a_stride, reinterpret_cast<const float*>(b),
                                x.c + col, x.c_stride, x.accumulate);
  } else if constexpr (kVecs > 1) {
    GemmLastPanel<kVecs - 1>(x, col, width, b);
  }
}

void Gemm(const Product& x) {
  for (int32_t col = 0; col < x.cols; col += kPanelWidth) {
    const int32_t width = x.cols - col < kPanelWidth ? x.cols - col : kPanelWidth;
    GemmLastPanel<kTileVecs>(x, col, width, x.b + int64_t{col} * x.depth);
  }
}

// Columns that are summed before they are added to a row's sum. Column counts are
// multiples of it.
constexpr int32_t kGroup = 16;
constexpr float kMinusInfinity = -__builtin_inff();

// Scales and exponentiates one row. Returns the sum of its probabilities, added from
// the last slot to the first as in GemmTile.
template <bool kPairs>
inline float ExponentiateRow(int32_t cols, float scale, float row_max, float* scores,
                             uint32_t* pairs) {
  const Vec factor = Vec::Set1(scale);
  const Vec minus_max = Vec::Set1(row_max == kMinusInfinity ? 0.0f : -row_max);
  Vec sum = Vec::Zero();
  if constexpr (kPairs) {
    for (int32_t j = cols - 2 * Vec::kLanes; j >= 0; j -= 2 * Vec::kLanes) {
      const Vec low = Vec::Exp2(Vec::Fma(Vec::Load(scores + j), factor, minus_max));
      const Vec high =
          Vec::Exp2(Vec::Fma(Vec::Load(scores + j + Vec::kLanes), factor, minus_max));
      StorePairs(pairs + j / 2, low, high);
      sum = Vec::Add(sum, Vec::Add(low, high));
    }
  } else {
    for (int32_t j = cols - kGroup; j >= 0; j -= kGroup) {
      Vec part = Vec::Zero();
      for (int32_t i = j + kGroup - Vec::kLanes; i >= j; i -= Vec::kLanes) {
        const Vec p = Vec::Exp2(Vec::Fma(Vec::Load(scores + i), factor, minus_max));
        p.Store(scores + i);
        part = Vec::Add(part, p);
      }
      sum = Vec::Add(sum, part);
    }
  }
  return sum.HorizontalAdd();
}

// Largest score of a row. With positions it also sets unseen columns to -inf.
inline float RowMaximum(int32_t cols, const int32_t* positions, int32_t last,
                        float* scores) {
  Vec top = Vec::Set1(kMinusInfinity);
  if (positions == nullptr) {
    for (int32_t j = 0; j < cols; j += Vec::kLanes) {
      top = Vec::Max(top, Vec::Load(scores + j));
    }
  } else {
    for (int32_t j = 0; j < cols; j += Vec::kLanes) {
      const Vec seen = Vec::KeepSeen(Vec::Load(scores + j), positions + j, last);
      seen.Store(scores + j);
      top = Vec::Max(top, seen);
    }
  }
  return top.HorizontalMax();
}

// Above this value a product that is rounded once (the maximum) and one that is not
// rounded (inside the multiply-add) may differ by more than the exponent's range, so
// scores are scaled first. Below it the difference is common to a row and cancels out.
constexpr float kLargeLogit = 0x1p24f;

inline void ScaleRow(int32_t cols, float scale, float* scores) {
  const Vec factor = Vec::Set1(scale);
  for (int32_t j = 0; j < cols; j += Vec::kLanes) {
    Vec::Mul(Vec::Load(scores + j), factor).Store(scores + j);
  }
}

// Rows whose maxima are computed before the first of them is exponentiated, so that the
// dependent steps of one row overlap with those of its neighbours.
constexpr int32_t kSoftmaxRows = 8;

// Multiplies a row's sum and output by 2^(old_max - new_max).
inline void Rescale(const SoftmaxTile& tile, int32_t r, float new_max) {
  const Vec shrink = Vec::Exp2(Vec::Set1(tile.row_max[r] - new_max));
  float* out = tile.out + static_cast<int64_t>(r) * tile.head_dim;
  for (int32_t d = 0; d < tile.head_dim; d += Vec::kLanes) {
    Vec::Mul(Vec::Load(out + d), shrink).Store(out + d);
  }
  float lanes[Vec::kLanes];
  shrink.Store(lanes);
  tile.row_sum[r] *= lanes[0];
  tile.row_max[r] = new_max;
}

template <bool kPairs>
void SoftmaxRows(const SoftmaxTile& tile) {
  for (int32_t first = 0; first < tile.rows; first += kSoftmaxRows) {
    const int32_t end =
        first + kSoftmaxRows < tile.rows ? first + kSoftmaxRows : tile.rows;
    float tops[kSoftmaxRows];
    for (int32_t r = first; r < end; ++r) {
      tops[r - first] = RowMaximum(tile.cols, tile.positions, tile.first_query + r,
                                   tile.scores + static_cast<int64_t>(r) * tile.cols) *
                        tile.scale;
    }
    for (int32_t r = first; r < end; ++r) {
      const float top = tops[r - first];
      if (top > tile.row_max[r]) Rescale(tile, r, top);
      float* scores = tile.scores + static_cast<int64_t>(r) * tile.cols;
      float scale = tile.scale;
      if (__builtin_fabsf(tile.row_max[r]) >= kLargeLogit) {
        ScaleRow(tile.cols, scale, scores);
        scale = 1.0f;
      }
      uint32_t* pairs =
          kPairs ? tile.pairs + static_cast<int64_t>(r) * (tile.cols / 2) : nullptr;
      tile.row_sum[r] +=
          ExponentiateRow<kPairs>(tile.cols, scale, tile.row_max[r], scores, pairs);
    }
  }
}

void Softmax(const SoftmaxTile& tile) {
  if constexpr (kHasPairs) {
    if (tile.pairs != nullptr) return SoftmaxRows<true>(tile);
  }
  SoftmaxRows<false>(tile);
}

// Scores of one lane group of proxies, in units of log2.
template <ProxyRounding kRounding>
inline Vec ProxyScore(const ProxyTile& tile, const float* at) {
  const Vec raw = Vec::Load(at);
  if constexpr (kRounding == ProxyRounding::kNone) {
    return Vec::Mul(raw, Vec::Set1(tile.scale));
  } else {
    const Vec root = Vec::Set1(tile.sqrt_head_dim);
    const Vec score = RoundTo<kRounding>(Vec::Div(RoundTo<kRounding>(raw), root));
    return Vec::Mul(score, Vec::Set1(1.44269504088896341f));
  }
}

template <ProxyRounding kRounding>
void ProxySoftmaxColumns(const ProxyTile& tile) {
  for (int32_t p = 0; p < tile.proxies; p += Vec::kLanes) {
    Vec top = Vec::Set1(kMinusInfinity);
    for (int32_t k = 0; k < tile.keys; ++k) {
      float* at = tile.scores + static_cast<int64_t>(k) * tile.proxies + p;
      const Vec score = ProxyScore<kRounding>(tile, at);
      score.Store(at);
      top = Vec::Max(top, score);
    }
    Vec sum = Vec::Zero();
    for (int32_t k = 0; k < tile.keys; ++k) {
      float* at = tile.scores + static_cast<int64_t>(k) * tile.proxies + p;
      const Vec e = Vec::Exp2(Vec::Sub(Vec::Load(at), top));
      e.Store(at);
      sum = Vec::Add(sum, e);
    }
    top.Store(tile.tile_max + p);
    sum.Store(tile.tile_sum + p);
  }
}

void ProxySoftmax(const ProxyTile& tile) {
  switch (tile.rounding) {
    case ProxyRounding::kNone:
      return ProxySoftmaxColumns<ProxyRounding::kNone>(tile);
    case ProxyRounding::kF16:
      return ProxySoftmaxColumns<ProxyRounding::kF16>(tile);
    case ProxyRounding::kBf16:
      return ProxySoftmaxColumns<ProxyRounding::kBf16>(tile);
  }
}

void WeightedSums(int32_t keys, int32_t proxies, const float* scores,
                  const float* weights, float* sums) {
  for (int32_t k = 0; k < keys; ++k) {
    const float* row = scores + static_cast<int64_t>(k) * proxies;
    Vec sum = Vec::Zero();
    for (int32_t p = 0; p < proxies; p += Vec::kLanes) {
      sum = Vec::Fma(Vec::Load(row + p), Vec::Load(weights + p), sum);
    }
    sums[k] += sum.HorizontalAdd();
  }
}

void AddRows(const float* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    Vec::Add(Vec::Load(target + i), Vec::Load(source + i)).Store(target + i);
  }
}

void DivideRows(float divisor, float* target, int64_t count) {
  const Vec by = Vec::Set1(divisor);
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    Vec::Div(Vec::Load(target + i), by).Store(target + i);
  }
}

constexpr TileKernels MakeKernels(const char* isa_name, GemmFunction gemm_pairs) {
  return {
      .isa_name = isa_name,
      .panel_width = kPanelWidth,
      .gemm = Gemm,
      .gemm_pairs = gemm_pairs,
      .softmax = Softmax,
      .proxy_softmax = ProxySoftmax,
      .weighted_sums = WeightedSums,
      .f16_to_f32 = F16ToF32,
      .bf16_to_f32 = Bf16ToF32,
      .f32_to_f16 = F32ToF16,
      .f32_to_bf16 = F32ToBf16,
      .add = AddRows,
      .divide = DivideRows,
  };
}

#undef PBS_UNROLL
