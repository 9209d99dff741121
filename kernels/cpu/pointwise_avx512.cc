// Pointwise kernels for AVX-512 F, BW, DQ and VL.
#include "cpu/pointwise_kernels.h"

#define PBS_LANES 16
#define PBS_DOT_ROWS 4

namespace pbs::cpu {
namespace {

#include "cpu/pointwise_impl.h"

}  // namespace

const PointwiseKernels kAvx512Pointwise = kTable;

}  // namespace pbs::cpu
