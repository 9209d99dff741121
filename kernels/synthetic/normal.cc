#include "kernels/synthetic/normal.h"

#include <array>
#include <cmath>

namespace pbs {
namespace {

// Marsaglia and Tsang's ziggurat: kLayers horizontal strips of equal area over the
// right half of exp(-x^2/2). A point in a strip lies under the curve for certain when
// its x is below the next strip's edge; that is 99 of 100 draws.
constexpr int kLayers = 256;
constexpr double kTailStart = 3.6541528853610088;  // for 256 strips
constexpr double kStripArea = 0.00492867323399;

struct Ziggurat {
  std::array<double, kLayers + 1> edge;    // right edge of a strip; edge[0] is virtual
  std::array<double, kLayers + 1> height;  // exp(-edge^2 / 2)

  Ziggurat() {
    const double tail_height = std::exp(-0.5 * kTailStart * kTailStart);
    edge[0] = kStripArea / tail_height;
    edge[1] = kTailStart;
    for (int i = 2; i < kLayers; ++i) {
      const double below = std::exp(-0.5 * edge[i - 1] * edge[i - 1]);
      edge[i] = std::sqrt(-2.0 * std::log(kStripArea / edge[i - 1] + below));
    }
    edge[kLayers] = 0;
    for (int i = 0; i <= kLayers; ++i) height[i] = std::exp(-0.5 * edge[i] * edge[i]);
  }
};

const Ziggurat& Tables() {
  static const Ziggurat tables;
  return tables;
}

double TailNormal(NormalSource& source) {
  while (true) {
    const double x = std::log(1.0 - source.Uniform()) / kTailStart;
    const double y = std::log(1.0 - source.Uniform());
    if (-2.0 * y > x * x) return kTailStart - x;
  }
}

}  // namespace

double NormalSource::Normal() {
  const Ziggurat& z = Tables();
  while (true) {
    const uint64_t bits = Bits();
    const int layer = static_cast<int>(bits & (kLayers - 1));
    const double sign = (bits & kLayers) != 0 ? -1.0 : 1.0;
    const double x = static_cast<double>(bits >> 11) * 0x1p-53 * z.edge[layer];
    if (x < z.edge[layer + 1]) return sign * x;
    if (layer == 0) return sign * TailNormal(*this);
    const double y =
        z.height[layer] + Uniform() * (z.height[layer + 1] - z.height[layer]);
    if (y < std::exp(-0.5 * x * x)) return sign * x;
  }
}

}  // namespace pbs
