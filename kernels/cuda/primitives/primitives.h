// What kernels may ask of the machine. One body, two compilers: nvcc takes the PTX of
// ptx.h, the host compiler the emulation of tests/emulator (PBS_EMULATOR).
//
// Every kernel uses these wrappers alone: no inline PTX, no raw access to memory that a
// wrapper exists for. What a wrapper does is written at its declaration in ptx.h; the
// emulation must do the same and report what the hardware would not.
#pragma once

#if defined(PBS_EMULATOR)
#include "tests/emulator/primitives.h"
#else
#include "cuda/primitives/ptx.h"
#endif
