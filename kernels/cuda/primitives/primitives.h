// Machine operations for kernels. The same kernel source has two compilers: nvcc uses
// the PTX of ptx.h, the host compiler uses the emulation in kernels/emulator
// (PBS_EMULATOR).
//
// Kernels use only these wrappers: no inline PTX, and no raw access to memory for which
// a wrapper exists. ptx.h documents each wrapper at its declaration. The emulation must
// do the same, and it reports errors that the hardware would not report.
#pragma once

#if defined(PBS_EMULATOR)
#include "emulator/primitives.h"
#else
#include "cuda/primitives/ptx.h"
#endif
