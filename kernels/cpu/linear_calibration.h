// Whether bf16 products pay on this CPU.
//
// CPUID cannot say: AVX512-BF16 multiplies at twice the f32 rate on some designs and at
// half of it on others. So a short product is timed in both dtypes when a backend
// starts (30 to 100 ms of CPU time on one thread).
//
// Threading: call from one thread while the machine is not saturated by this process.
#pragma once

namespace pbs::cpu {

// A gain below this does not pay for the coarser rounding.
inline constexpr double kBf16SpeedupMin = 1.1;

// bf16 over f32 product rate; 0 when oneDNN has no bf16 product for this CPU.
double MeasureBf16Speedup();

}  // namespace pbs::cpu
