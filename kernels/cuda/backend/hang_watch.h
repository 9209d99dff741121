// Finds the wait of Hopper's attention that never ended, for programs that examine a
// hang (tests/gpu). In programs that link pbs_cuda_bounded, the first wait that lasts a
// second records its barrier and ends. From then on every wait ends after a
// millisecond, so that results are wrong.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/attention/attention_variant.h"

namespace pbs::cuda {

// Describes the wait that never ended: "block 7, warpgroup 1 waits for k_full[1],
// parity 0, tile 3". The barrier's name is that in the variant's kernel for `head_dim`.
// "" when every wait ended, and always in other programs. Safe from any thread, also
// while a kernel hangs. Call it once before a kernel runs, so that kernels get the
// address of the record.
std::string DescribeHang(int32_t head_dim, AttentionVariant variant);

}  // namespace pbs::cuda
