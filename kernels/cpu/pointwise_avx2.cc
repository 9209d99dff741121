// Pointwise kernels for AVX2, FMA and F16C.
#include "cpu/pointwise_kernels.h"

#define PBS_LANES 8
#define PBS_DOT_ROWS 2

namespace pbs::cpu {
namespace {

#include "cpu/pointwise_impl.h"

}  // namespace

const PointwiseKernels kAvx2Pointwise = kTable;

}  // namespace pbs::cpu
