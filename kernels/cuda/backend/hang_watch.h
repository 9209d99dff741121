// Which wait of Hopper's attention never ended: for the check program that runs after a
// hang (tests/gpu). In programs that link pbs_cuda_bounded the first wait of a second
// tells what it waits for, and all such waits end: results are wrong from then on.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/primitives/hang_record.h"
#include "pbs/status.h"

namespace pbs::cuda {

// Memory of the host that the kernels write to: hung is 0 until one hangs. It stays
// until the process ends. Unimplemented in other programs.
StatusOr<const HangRecord*> WatchHangs();

// Such as "k_full[1]", of the chosen kernel of a head dim; its offset where none is
// there.
std::string NameBarrier(int32_t head_dim, int32_t barrier);

}  // namespace pbs::cuda
