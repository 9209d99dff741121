// Pointwise kernels for any x86-64 (SSE2).
#include "cpu/pointwise_kernels.h"

#define PBS_LANES 4
#define PBS_DOT_ROWS 2

namespace pbs::cpu {
namespace {

#include "cpu/pointwise_impl.h"

}  // namespace

const PointwiseKernels kScalarPointwise = kTable;

}  // namespace pbs::cpu
