// Warpgroup products, one PTX instruction each. The instruction must list its
// registers. Internal to ptx.h.
#pragma once

#include <cstdint>

namespace pbs::cuda {

// Registers 0 .. 31 and 0 .. 63 of an instruction, and the sums d[] that they hold.
#define PBS_NAMES_32                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define PBS_NAMES_64                         \
  PBS_NAMES_32                               \
  ", "                                       \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define PBS_SUMS_32                                                                   \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), \
      "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),      \
      "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),   \
      "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),   \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),   \
      "+f"(d[31])
#define PBS_SUMS_64                                                                 \
  PBS_SUMS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),     \
      "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), \
      "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
      "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), \
      "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

// d[64, 128] (+)= a[64, 16] b[16, 128], both K-major in shared memory.
#define PBS_WGMMA_SHARED_128(type)                                                   \
  asm volatile(                                                                      \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                               \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" PBS_NAMES_64 \
      "}, %64, %65, add, 1, 1, 0, 0;\n}"                                             \
      : PBS_SUMS_64                                                                  \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// d[64, n] += a[64, 16] b[16, n]: a in registers, b MN-major.
#define PBS_WGMMA_REGISTERS(n, type, names, sums, a_and_b)                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
               " {" names "}, " a_and_b ", 1, 1, 1, 1;"                       \
               : sums                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define PBS_WGMMA_REGISTERS_128(type)                         \
  PBS_WGMMA_REGISTERS("128", type, PBS_NAMES_64, PBS_SUMS_64, \
                      "{%64, %65, %66, %67}, %68")
#define PBS_WGMMA_REGISTERS_64(type)                         \
  PBS_WGMMA_REGISTERS("64", type, PBS_NAMES_32, PBS_SUMS_32, \
                      "{%32, %33, %34, %35}, %36")

template <class Element>
__device__ __forceinline__ void WgmmaShared(float (&d)[64], uint64_t a, uint64_t b,
                                            bool accumulate) {
  if constexpr (Element::kIsBf16) {
    PBS_WGMMA_SHARED_128("bf16");
  } else {
    PBS_WGMMA_SHARED_128("f16");
  }
}

template <class Element>
__device__ __forceinline__ void WgmmaRegisters(float (&d)[64], const uint32_t (&a)[4],
                                               uint64_t b) {
  if constexpr (Element::kIsBf16) {
    PBS_WGMMA_REGISTERS_128("bf16");
  } else {
    PBS_WGMMA_REGISTERS_128("f16");
  }
}

template <class Element>
__device__ __forceinline__ void WgmmaRegisters(float (&d)[32], const uint32_t (&a)[4],
                                               uint64_t b) {
  if constexpr (Element::kIsBf16) {
    PBS_WGMMA_REGISTERS_64("bf16");
  } else {
    PBS_WGMMA_REGISTERS_64("f16");
  }
}

#undef PBS_NAMES_32
#undef PBS_NAMES_64
#undef PBS_SUMS_32
#undef PBS_SUMS_64
#undef PBS_WGMMA_SHARED_128
#undef PBS_WGMMA_REGISTERS
#undef PBS_WGMMA_REGISTERS_128
#undef PBS_WGMMA_REGISTERS_64

}  // namespace pbs::cuda
