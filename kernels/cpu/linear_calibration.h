// Measures whether bf16 products are faster than f32 products on this CPU.
//
// CPUID does not tell: AVX512-BF16 multiplies at twice the f32 rate on some CPUs and at
// half of it on others. So a short product is timed in both dtypes when a backend is
// created (30 to 100 ms of CPU time on one thread).
//
// Threading: call it from one thread, while this process leaves CPUs idle.
#pragma once

namespace pbs::cpu {

// Below this speedup bf16 is not used, because its rounding is coarser.
inline constexpr double kBf16SpeedupMin = 1.1;

// bf16 over f32 product rate; 0 when oneDNN has no bf16 product for this CPU.
double MeasureBf16Speedup();

}  // namespace pbs::cpu
