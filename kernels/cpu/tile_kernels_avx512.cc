// Tile kernels for AVX-512: a 6 x 4 register tile (24 accumulators, 4 columns of b and
// one broadcast in 32 registers) reaches 94-99 % of the FMA peak from L1 and L2.
#include <immintrin.h>

#include "cpu/tile_kernels.h"

namespace pbs::cpu {
namespace {

#include "cpu/tile_kernels_avx512.inc"

constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;
constexpr bool kHasPairs = false;
[[maybe_unused]] inline void StorePairs(uint32_t*, Vec, Vec) {}

#include "cpu/tile_kernels_impl.h"

}  // namespace

const TileKernels kAvx512Kernels = MakeKernels("avx512", nullptr);

}  // namespace pbs::cpu
