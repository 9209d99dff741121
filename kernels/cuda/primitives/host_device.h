// Macros for arithmetic that host code and kernels share.
#pragma once

#if defined(__CUDACC__)
#define PBS_HOST_DEVICE __host__ __device__
#else
#define PBS_HOST_DEVICE
#endif
