// The device's implementation of primitives.h. PTX names are those of the PTX ISA 8.x
// manual.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/primitives/ptx_wgmma.h"

#include "cuda/primitives/host_device.h"

#define PBS_DEVICE __device__ __forceinline__
#define PBS_UNROLL _Pragma("unroll")
#define PBS_NO_UNROLL _Pragma("unroll 1")

namespace pbs::cuda {

// Created by the host (cuTensorMapEncodeTiled): [batch, heads, rows, width], 128-byte
// swizzle.
using TensorMap = CUtensorMap;

// ---- who am I

PBS_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
PBS_DEVICE int BlockIndex() { return static_cast<int>(blockIdx.x); }
// The block's dynamic shared memory, 1024-byte aligned.
PBS_DEVICE uint8_t* SharedMemory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}
PBS_DEVICE uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
// Nanoseconds of a clock that all multiprocessors share, in steps that the device
// chooses.
PBS_DEVICE int64_t GlobalTimer() {
  int64_t nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds)::"memory");
  return nanoseconds;
}

// ---- warps; all 32 lanes call

template <class T>
PBS_DEVICE T Shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}
template <class T>
PBS_DEVICE T ShuffleXor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// Bit l of the result is the vote of lane l.
PBS_DEVICE uint32_t Ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }

// ---- barriers

PBS_DEVICE void SyncThreads() { __syncthreads(); }
// Waits until `threads` threads of the block have arrived, including those that call
// BarrierArrive().
PBS_DEVICE void BarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PBS_DEVICE void BarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- memory

using Int2 = int2;
struct alignas(16) Words4 {
  uint32_t words[4];
};

// Converts a value of 16 bytes to its four words, and back.
template <class T>
PBS_DEVICE T FromWords(const uint32_t (&words)[4]) {
  static_assert(sizeof(T) == 16);
  T value;
  __builtin_memcpy(&value, words, 16);
  return value;
}

// It does not use the read-only cache: only ordinary loads after BeginGrid() see the
// writes of the kernel before.
template <class T>
PBS_DEVICE T LoadGlobal(const T* at) {
  if constexpr (sizeof(T) <= 8) {
    return *at;
  } else {
    T value;
    __builtin_memcpy(&value, __builtin_assume_aligned(at, alignof(T)), sizeof(T));
    return value;
  }
}
template <class T>
PBS_DEVICE void StoreGlobal(T* at, const T& value) {
  if constexpr (sizeof(T) == 16 && alignof(T) == 16) {
    // An assignment would store the words one by one.
    uint32_t words[4];
    __builtin_memcpy(words, &value, 16);
    asm volatile(
        "st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
        : "memory");
  } else {
    *at = value;
  }
}
PBS_DEVICE int32_t AtomicAdd(int32_t* at, int32_t value) {
  return atomicAdd(at, value);
}
PBS_DEVICE int32_t AtomicAddShared(int32_t* at, int32_t value) {
  return atomicAdd(at, value);
}
PBS_DEVICE void AtomicAdd(int64_t* at, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at),
            static_cast<unsigned long long>(value));
}
PBS_DEVICE void AtomicMax(int64_t* at, int64_t value) {
  atomicMax(reinterpret_cast<long long*>(at), static_cast<long long>(value));
}
// Each call reads or writes memory.
template <class T>
PBS_DEVICE T LoadShared(const T* at) {
  if constexpr (sizeof(T) <= 4) {
    return *static_cast<const volatile T*>(at);
  } else if constexpr (sizeof(T) == 16 && alignof(T) == 16) {
    uint32_t words[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(SharedAddress(at))
                 : "memory");
    return FromWords<T>(words);
  } else {
    static_assert(sizeof(T) % 8 == 0 && alignof(T) >= 8);
    uint64_t words[sizeof(T) / 8];
    PBS_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(T) / 8); ++i) {
      asm volatile("ld.shared.u64 %0, [%1];"
                   : "=l"(words[i])
                   : "r"(SharedAddress(at) + i * 8)
                   : "memory");
    }
    T value;
    __builtin_memcpy(&value, words, sizeof(T));
    return value;
  }
}
template <class T>
PBS_DEVICE void StoreShared(T* at, const T& value) {
  if constexpr (sizeof(T) <= 4) {
    *static_cast<volatile T*>(at) = value;
  } else {
    static_assert(sizeof(T) % 8 == 0 && alignof(T) >= 8);
    uint64_t words[sizeof(T) / 8];
    __builtin_memcpy(words, &value, sizeof(T));
    PBS_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(T) / 8); ++i) {
      asm volatile("st.shared.u64 [%0], %1;" ::"r"(SharedAddress(at) + i * 8),
                   "l"(words[i])
                   : "memory");
    }
  }
}

// ---- arithmetic

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2E = 1.44269504088896341f;
// If one argument is NaN, the result is the other one.
PBS_DEVICE float Max(float a, float b) { return fmaxf(a, b); }
PBS_DEVICE float Sqrt(float x) { return sqrtf(x); }
PBS_DEVICE double Sqrt(double x) { return sqrt(x); }
PBS_DEVICE double Log(double x) { return log(x); }
PBS_DEVICE float Ceil(float x) { return ceilf(x); }
// To the nearest integer, ties to even.
PBS_DEVICE double Round(double x) { return rint(x); }
PBS_DEVICE uint32_t FloatBits(float x) { return __float_as_uint(x); }
PBS_DEVICE float BitsToFloat(uint32_t bits) { return __uint_as_float(bits); }
PBS_DEVICE int PopulationCount(uint32_t bits) { return __popc(bits); }
// 2^x and log2(x), approximately; denormal results become 0.
PBS_DEVICE float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PBS_DEVICE float Log2(float x) { return __log2f(x); }

// 16-bit elements. Pack() rounds to nearest and puts the first value in the low half.
// Low() and High() widen the halves. Round() is the value after rounding.
struct Bf16Element {
  static constexpr bool kIsBf16 = true;
  PBS_DEVICE static uint32_t Pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  PBS_DEVICE static float Low(uint32_t word) { return __uint_as_float(word << 16); }
  PBS_DEVICE static float High(uint32_t word) {
    return __uint_as_float(word & 0xFFFF0000u);
  }
  PBS_DEVICE static float Round(float x) { return Low(Pack(x, 0)); }
};
struct F16Element {
  static constexpr bool kIsBf16 = false;
  PBS_DEVICE static uint32_t Pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  PBS_DEVICE static float Low(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
  }
  PBS_DEVICE static float High(uint32_t word) { return Low(word >> 16); }
  PBS_DEVICE static float Round(float x) { return Low(Pack(x, 0)); }
};

// ---- grids

// Waits for the kernels before this one on the stream. Every thread of a kernel calls
// it first. After the call the next kernel may start on multiprocessors that this one
// leaves free. It does nothing where kernels are launched without overlap.
PBS_DEVICE void BeginGrid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- registers

// Moves registers between the warpgroups of a block; the whole warpgroup calls.
template <int kRegisters>
PBS_DEVICE void IncreaseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
PBS_DEVICE void DecreaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// The compiler may not move uses of these registers across this point.
template <int kCount>
PBS_DEVICE void PinRegisters(float (&registers)[kCount]) {
  PBS_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
// Forces the computation of these values before the following wait, by a trap that
// never fires. Without it the compiler moves the softmax after the wait, and nothing
// overlaps.
PBS_DEVICE void PinBeforeWait(float a, float b) {
  asm volatile(
      "{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never trap;\n"
      "setp.lt.f32 never, %1, 0f00000000;\n@never trap;\n}" ::"f"(a),
      "f"(b));
}

// True when sums must be pinned where registers are scarce.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kDelaysSums = true;
#else
constexpr bool kDelaysSums = false;
#endif

// ---- warpgroup products; 128 threads call

PBS_DEVICE uint32_t DescriptorStart(const void* shared) {
  return SharedAddress(shared) >> 4;
}
PBS_DEVICE uint64_t Descriptor(uint32_t low, uint32_t high) {
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(high));
  return descriptor;
}
// Call it before the first product, and after writing registers of a product.
PBS_DEVICE void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PBS_DEVICE void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Returns when at most kGroups committed groups are under way.
template <int kGroups>
PBS_DEVICE void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

}  // namespace pbs::cuda

#include "cuda/primitives/ptx_bulk.h"
#include "cuda/primitives/ptx_warp.h"
