// The body of every pointwise table. A file per ISA defines PBS_LANES (f32 lanes of its
// registers) and PBS_DOT_ROWS (register tile of RowDots), then includes this header
// inside its own anonymous namespace. See pointwise_kernels.h.
//
// It uses the compilers' vector extension, so that the same code serves SSE2, AVX2 and
// AVX-512.

constexpr int64_t kLanes = PBS_LANES;

typedef float F32s __attribute__((vector_size(PBS_LANES * 4)));
typedef int32_t I32s __attribute__((vector_size(PBS_LANES * 4)));
typedef uint32_t U32s __attribute__((vector_size(PBS_LANES * 4)));
typedef uint16_t U16s __attribute__((vector_size(PBS_LANES * 2)));

inline F32s Splat(float x) { return F32s{} + x; }
inline F32s AsFloat(U32s x) { return (F32s)x; }
inline U32s AsBits(F32s x) { return (U32s)x; }
inline U32s Select(I32s mask, U32s yes, U32s no) {
  return ((U32s)mask & yes) | (~(U32s)mask & no);
}
inline F32s Select(I32s mask, F32s yes, F32s no) {
  return AsFloat(Select(mask, AsBits(yes), AsBits(no)));
}

// The first `count` <= kLanes elements; the other lanes are zero.
template <class V, class T>
inline V LoadSome(const T* source, int64_t count) {
  V v = {};
  if (count >= kLanes) {
    __builtin_memcpy(&v, source, sizeof(V));
  } else {
    __builtin_memcpy(&v, source, static_cast<uint64_t>(count) * sizeof(T));
  }
  return v;
}

template <class V, class T>
inline void StoreSome(V v, T* target, int64_t count) {
  if (count >= kLanes) {
    __builtin_memcpy(target, &v, sizeof(V));
  } else {
    __builtin_memcpy(target, &v, static_cast<uint64_t>(count) * sizeof(T));
  }
}

// Element types: each reads and writes `count` <= kLanes elements at index `at`.
// Rounding as pbs/dtype.h.
struct AsF32 {
  static F32s Load(const void* p, int64_t at, int64_t count) {
    return LoadSome<F32s>(static_cast<const float*>(p) + at, count);
  }
  static void Store(F32s x, void* p, int64_t at, int64_t count) {
    StoreSome(x, static_cast<float*>(p) + at, count);
  }
};

struct AsBf16 {
  static F32s Load(const void* p, int64_t at, int64_t count) {
    const U16s halves = LoadSome<U16s>(static_cast<const uint16_t*>(p) + at, count);
    return AsFloat(__builtin_convertvector(halves, U32s) << 16);
  }
  static void Store(F32s x, void* p, int64_t at, int64_t count) {
    const U32s bits = AsBits(x);
    const U32s rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const U32s quiet = (bits >> 16) | 0x40u;
    const U32s words = Select((I32s)(x != x), quiet, rounded);
    StoreSome(__builtin_convertvector(words, U16s), static_cast<uint16_t*>(p) + at,
              count);
  }
};

struct AsF16 {
  static F32s Load(const void* p, int64_t at, int64_t count) {
    const U16s halves = LoadSome<U16s>(static_cast<const uint16_t*>(p) + at, count);
    const U32s wide = __builtin_convertvector(halves, U32s);
    const U32s magnitude = (wide & 0x7FFFu) << 13;
    U32s bits = magnitude + 0x38000000u;  // exponent bias 127 instead of 15
    bits = Select((I32s)(magnitude >= 0x0F800000u), magnitude | 0x7F800000u, bits);
    // Subnormals use an integer conversion, because arithmetic on f32 subnormals is
    // slow.
    const F32s small = __builtin_convertvector((I32s)(wide & 0x3FFu), F32s) * 0x1p-24f;
    bits = Select((I32s)(magnitude < 0x00800000u), AsBits(small), bits);
    return AsFloat(bits | ((wide & 0x8000u) << 16));
  }
  static void Store(F32s x, void* p, int64_t at, int64_t count) {
    const U32s bits = AsBits(x);
    const U32s sign = (bits >> 16) & 0x8000u;
    const U32s magnitude = bits & 0x7FFFFFFFu;
    const U32s normal =
        (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Adding 0.5 aligns the wanted bits at the bottom of the fraction and rounds.
    const U32s small = AsBits(AsFloat(magnitude) + 0.5f) - 0x3F000000u;
    U32s words = Select((I32s)(magnitude < 0x38800000u), small, normal);
    words = Select((I32s)(magnitude >= 0x477FF000u), U32s{} + 0x7C00u, words);
    words = Select((I32s)(magnitude > 0x7F800000u), U32s{} + 0x7E00u, words);
    StoreSome(__builtin_convertvector(words | sign, U16s),
              static_cast<uint16_t*>(p) + at, count);
  }
};

// Calls visit(AsF32{}), visit(AsF16{}) or visit(AsBf16{}).
template <class Visitor>
inline void VisitElement(Element type, Visitor visit) {
  switch (type) {
    case Element::kF32:
      return visit(AsF32{});
    case Element::kF16:
      return visit(AsF16{});
    case Element::kBf16:
      return visit(AsBf16{});
  }
}

// Calls body(at, lanes) for whole registers, then once for the rest. Inlined, so that
// `lanes` is a constant in the loop.
template <class Body>
inline void ForLanes(int64_t count, Body body) {
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) body(at, kLanes);
  if (at < count) body(at, count - at);
}

inline float Sum(F32s x) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof(lanes));
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// e^x to about 1 ulp for x in [-87, 88], clamped there; NaN stays NaN.
inline F32s Exp(F32s x) {
  x = Select((I32s)(x > 88.0f), Splat(88.0f), x);
  x = Select((I32s)(x < -87.0f), Splat(-87.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer and puts it in the low bits.
  const F32s shifted = x * 1.44269504f + 12582912.0f;
  const F32s n = shifted - 12582912.0f;
  F32s f = x - n * 0.693359375f;  // ln 2 in two parts, the first exact times n
  f = f + n * 2.12194440e-4f;
  F32s p = Splat(1.0f / 5040.0f);
  p = p * f + 1.0f / 720.0f;
  p = p * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const U32s exponent = (AsBits(shifted) - 0x4B400000u + 127u) << 23;
  return p * AsFloat(exponent);
}

void Widen(const void* source, Element type, float* target, int64_t count) {
  VisitElement(type, [=](auto in) {
    ForLanes(count, [=](int64_t i, int64_t lanes) {
      AsF32::Store(in.Load(source, i, lanes), target, i, lanes);
    });
  });
}

void Narrow(const float* source, void* target, Element type, int64_t count) {
  VisitElement(type, [=](auto out) {
    ForLanes(count, [=](int64_t i, int64_t lanes) {
      out.Store(AsF32::Load(source, i, lanes), target, i, lanes);
    });
  });
}

// 1 / sqrt(mean(x^2) + epsilon)
template <class In>
inline float InverseRms(In in, const void* x, float epsilon, int64_t count) {
  F32s even = {};
  F32s odd = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const F32s a = in.Load(x, i, kLanes);
    const F32s b = in.Load(x, i + kLanes, kLanes);
    even += a * a;
    odd += b * b;
  }
  for (; i < count; i += kLanes) {
    const F32s a = in.Load(x, i, count - i);
    even += a * a;
  }
  return 1.0f / __builtin_sqrtf(Sum(even + odd) / static_cast<float>(count) + epsilon);
}

void RmsNorm(const float* x, const float* weight, float epsilon, int64_t count, void* y,
             Element y_type) {
  const float factor = InverseRms(AsF32{}, x, epsilon, count);
  VisitElement(y_type, [=](auto out) {
    ForLanes(count, [=](int64_t i, int64_t lanes) {
      const F32s scaled = AsF32::Load(x, i, lanes) * factor;
      out.Store(scaled * AsF32::Load(weight, i, lanes), y, i, lanes);
    });
  });
}

void RotateHead(const void* x, Element x_type, const float* norm, float epsilon,
                const float* cosines, const float* sines, int64_t head_dim, void* y,
                Element y_type) {
  const int64_t half = head_dim / 2;
  VisitElement(x_type, [=](auto in) {
    const float factor = norm == nullptr ? 1.0f : InverseRms(in, x, epsilon, head_dim);
    VisitElement(y_type, [=](auto out) {
      for (int64_t i = 0; i < half; i += kLanes) {
        F32s a = in.Load(x, i, kLanes);
        F32s b = in.Load(x, i + half, kLanes);
        if (norm != nullptr) {
          a *= factor * AsF32::Load(norm, i, kLanes);
          b *= factor * AsF32::Load(norm, i + half, kLanes);
        }
        const F32s cosine = AsF32::Load(cosines, i, kLanes);
        const F32s sine = AsF32::Load(sines, i, kLanes);
        out.Store(a * cosine - b * sine, y, i, kLanes);
        out.Store(b * cosine + a * sine, y, i + half, kLanes);
      }
    });
  });
}

inline F32s Biased(const float* sums, const float* bias, int64_t at, int64_t lanes) {
  const F32s x = AsF32::Load(sums, at, lanes);
  return bias == nullptr ? x : x + AsF32::Load(bias, at, lanes);
}

void StoreSums(const float* sums, const float* bias, int64_t count, void* y,
               Element y_type) {
  VisitElement(y_type, [=](auto out) {
    ForLanes(count, [=](int64_t i, int64_t lanes) {
      out.Store(Biased(sums, bias, i, lanes), y, i, lanes);
    });
  });
}

void AddSums(const float* sums, const float* bias, int64_t count, float* y) {
  ForLanes(count, [=](int64_t i, int64_t lanes) {
    const F32s before = AsF32::Load(y, i, lanes);
    AsF32::Store(before + Biased(sums, bias, i, lanes), y, i, lanes);
  });
}

void SwigluSums(const float* gate, const float* gate_bias, const float* up,
                const float* up_bias, int64_t count, void* y, Element y_type) {
  VisitElement(y_type, [=](auto out) {
    ForLanes(count, [=](int64_t i, int64_t lanes) {
      const F32s g = Biased(gate, gate_bias, i, lanes);
      const F32s u = Biased(up, up_bias, i, lanes);
      out.Store(g / (1.0f + Exp(-g)) * u, y, i, lanes);
    });
  });
}

// kRows x kCols dot products side by side.
template <int kRows, int kCols, class W>
inline void DotTile(W weights, const float* x, const void* w, int64_t first_col,
                    int64_t depth, float* y, int64_t y_stride) {
  F32s sums[kRows][kCols] = {};
  ForLanes(depth, [&](int64_t i, int64_t lanes) {
    F32s column[kCols];
    _Pragma("GCC unroll 8") for (int c = 0; c < kCols; ++c) {
      column[c] = weights.Load(w, (first_col + c) * depth + i, lanes);
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {
      const F32s row = AsF32::Load(x, r * depth + i, lanes);
      _Pragma("GCC unroll 8") for (int c = 0; c < kCols; ++c) {
        sums[r][c] += row * column[c];
      }
    }
  });
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) y[r * y_stride + c] = Sum(sums[r][c]);
  }
}

template <int kRows, class W>
inline void DotRows(W weights, const float* x, const void* w, int64_t cols,
                    int64_t depth, float* y, int64_t y_stride) {
  int64_t c = 0;
  for (; c + 4 <= cols; c += 4) {
    DotTile<kRows, 4>(weights, x, w, c, depth, y + c, y_stride);
  }
  for (; c < cols; ++c) DotTile<kRows, 1>(weights, x, w, c, depth, y + c, y_stride);
}

void RowDots(const float* x, int64_t rows, const void* w, Element w_type, int64_t cols,
             int64_t depth, float* y, int64_t y_stride) {
  VisitElement(w_type, [=](auto weights) {
    int64_t r = 0;
    for (; r + PBS_DOT_ROWS <= rows; r += PBS_DOT_ROWS) {
      DotRows<PBS_DOT_ROWS>(weights, x + r * depth, w, cols, depth, y + r * y_stride,
                            y_stride);
    }
    for (; r < rows; ++r) {
      DotRows<1>(weights, x + r * depth, w, cols, depth, y + r * y_stride, y_stride);
    }
  });
}

constexpr PointwiseKernels kTable = {
    Widen, Narrow, RmsNorm, RotateHead, StoreSums, AddSums, SwigluSums, RowDots,
};
