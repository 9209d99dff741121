// Which wait of Hopper's attention never ended: for the programs that run after a hang
// (tests/gpu). In those that link pbs_cuda_bounded the first wait of a second tells
// what it waits for, and ends, as from then on all waits of a millisecond do: results
// are wrong.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/attention/attention_variant.h"

namespace pbs::cuda {

// Where a kernel waited in vain, such as "block 7, warpgroup 1 waits for k_full[1],
// parity 0, tile 3": its barrier is one of a variant's kernel of a head dim. "" when
// none did, and always in other programs. From any thread, also while a kernel hangs;
// the first call, before a kernel runs, shows kernels where to write.
std::string DescribeHang(int32_t head_dim, AttentionVariant variant);

}  // namespace pbs::cuda
