// The host's implementation of cuda/primitives/primitives.h, for kernel source that the
// emulator runs. ptx.h documents each function.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/primitives/host_device.h"
#include "emulator/async.h"
#include "emulator/machine.h"
#include "emulator/synchronization.h"
#include "emulator/warp.h"
#include "pbs/dtype.h"

#define PBS_DEVICE inline
#define PBS_UNROLL
#define PBS_NO_UNROLL

namespace pbs::cuda {

using emulator::Location;
using emulator::TensorMap;

// ---- who am I

inline int ThreadIndex() { return emulator::ThreadIndex(); }
inline int BlockIndex() { return emulator::BlockIndex(); }
inline uint8_t* SharedMemory() { return emulator::SharedBase(); }
inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(shared) - SharedMemory());
}
inline int64_t GlobalTimer() { return emulator::GlobalTimer(); }

// ---- warps

template <class T>
T Shuffle(T value, int lane, Location where = Location::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Part {
    T value;
    int lane;
    T result;
  } part{value, lane, {}};
  const auto exchange = [](const emulator::WarpParts& parts) {
    for (void* at : parts) {
      if (at == nullptr) continue;
      auto& taker = *static_cast<Part*>(at);
      taker.result = static_cast<const Part*>(parts[taker.lane])->value;
    }
  };
  emulator::Together(&part, exchange, where);
  return part.result;
}
template <class T>
T ShuffleXor(T value, int mask, Location where = Location::current()) {
  return Shuffle(value, (ThreadIndex() % 32) ^ mask, where);
}

inline uint32_t Ballot(bool vote, Location where = Location::current()) {
  return emulator::Ballot(vote, where);
}

// ---- barriers

inline void SyncThreads(Location where = Location::current()) {
  emulator::SyncThreads(where);
}
inline void BarrierSync(int id, int threads, Location where = Location::current()) {
  emulator::BarrierSync(id, threads, where);
}
inline void BarrierArrive(int id, int threads, Location where = Location::current()) {
  emulator::BarrierArrive(id, threads, where);
}

struct Mbarrier {
  uint64_t word;
};
inline void MbarrierInit(Mbarrier* barrier, int arrivals,
                         Location where = Location::current()) {
  emulator::MbarrierInit(&barrier->word, arrivals, where);
}
inline void MbarrierInitFence() {}
inline void MbarrierArrive(Mbarrier* barrier, Location where = Location::current()) {
  emulator::MbarrierArrive(&barrier->word, 0, where);
}
inline void MbarrierArriveExpect(Mbarrier* barrier, int bytes,
                                 Location where = Location::current()) {
  emulator::MbarrierArrive(&barrier->word, bytes, where);
}
inline void MbarrierWait(Mbarrier* barrier, int parity,
                         Location where = Location::current()) {
  emulator::MbarrierWait(&barrier->word, parity, where);
}

// ---- copies

inline void CopyBox(void* target, const TensorMap& map, Mbarrier* barrier, int column,
                    int row, int head, int batch,
                    Location where = Location::current()) {
  emulator::CopyBox(target, map, &barrier->word, column, row, head, batch, where);
}

struct CachePolicy {};
inline CachePolicy EvictFirst() { return {}; }
inline CachePolicy EvictLast() { return {}; }
inline void CopyBox(void* target, const TensorMap& map, Mbarrier* barrier, int column,
                    int row, int head, int batch, CachePolicy,
                    Location where = Location::current()) {
  emulator::CopyBox(target, map, &barrier->word, column, row, head, batch, where);
}
inline void CopyBytes(void* target, const void* source, int bytes, Mbarrier* barrier,
                      Location where = Location::current()) {
  emulator::CopyBytes(target, source, bytes, &barrier->word, where);
}
inline void ProxyFence() { emulator::ProxyFence(); }
inline void StoreBox(const TensorMap& map, const void* source, int column, int row,
                     int head, int batch, Location where = Location::current()) {
  emulator::StoreBox(map, source, column, row, head, batch, where);
}
inline void StoreCommit() { emulator::StoreCommit(); }
inline void StoreWaitRead(Location where = Location::current()) {
  emulator::StoreWaitRead(where);
}

inline void CopyAsync16(uint32_t target, const void* source, bool inside,
                        Location where = Location::current()) {
  emulator::CopyAsync16(target, source, inside, where);
}
inline void CopyAsyncCommit() { emulator::CopyAsyncCommit(); }
template <int kGroups>
void CopyAsyncWait(Location where = Location::current()) {
  emulator::CopyAsyncWait(kGroups, where);
}

// ---- memory

struct alignas(8) Int2 {
  int32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t words[4];
};

template <class T>
T LoadGlobal(const T* at, Location where = Location::current()) {
  emulator::GlobalMemory::CheckRead(at, sizeof(T), alignof(T), where);
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}
template <class T>
void StoreGlobal(T* at, const T& value, Location where = Location::current()) {
  emulator::GlobalMemory::CheckWrite(at, sizeof(T), alignof(T), where);
  std::memcpy(at, &value, sizeof(T));
}
inline int32_t AtomicAdd(int32_t* at, int32_t value,
                         Location where = Location::current()) {
  emulator::GlobalMemory::CheckRead(at, 4, 4, where);
  const int32_t before = *at;
  *at += value;
  return before;
}
inline int32_t AtomicAddShared(int32_t* at, int32_t value,
                               Location where = Location::current()) {
  emulator::CheckReadable(at, 4, where);
  const int32_t before = *at;
  *at += value;
  emulator::Preempt();
  return before;
}
inline void AtomicAdd(int64_t* at, int64_t value,
                      Location where = Location::current()) {
  emulator::GlobalMemory::CheckRead(at, 8, 8, where);
  *at += value;
}
inline void AtomicMax(int64_t* at, int64_t value,
                      Location where = Location::current()) {
  emulator::GlobalMemory::CheckRead(at, 8, 8, where);
  *at = std::max(*at, value);
}
template <class T>
T LoadShared(const T* at, Location where = Location::current()) {
  emulator::CheckReadable(at, sizeof(T), where);
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}
template <class T>
void StoreShared(T* at, const T& value, Location where = Location::current()) {
  emulator::MarkWritten(at, sizeof(T), where);
  std::memcpy(at, &value, sizeof(T));
}

// ---- arithmetic

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2E = 1.44269504088896341f;
inline float Max(float a, float b) { return std::fmax(a, b); }
inline float Sqrt(float x) { return std::sqrt(x); }
inline double Sqrt(double x) { return std::sqrt(x); }
inline double Log(double x) { return std::log(x); }
inline float Ceil(float x) { return std::ceil(x); }
inline double Round(double x) { return std::nearbyint(x); }
inline uint32_t FloatBits(float x) { return std::bit_cast<uint32_t>(x); }
inline float BitsToFloat(uint32_t bits) { return std::bit_cast<float>(bits); }
inline int PopulationCount(uint32_t bits) { return std::popcount(bits); }
inline float Exp2(float x) { return std::exp2(x); }
inline float Log2(float x) { return std::log2(x); }

struct Bf16Element {
  static constexpr bool kIsBf16 = true;
  static uint32_t Pack(float low, float high) {
    return ToBf16(low).bits | static_cast<uint32_t>(ToBf16(high).bits) << 16;
  }
  static float Low(uint32_t word) { return ToFloat(bf16{static_cast<uint16_t>(word)}); }
  static float High(uint32_t word) { return Low(word >> 16); }
  static float Round(float x) { return Low(Pack(x, 0)); }
};
struct F16Element {
  static constexpr bool kIsBf16 = false;
  static uint32_t Pack(float low, float high) {
    return ToF16(low).bits | static_cast<uint32_t>(ToF16(high).bits) << 16;
  }
  static float Low(uint32_t word) { return ToFloat(f16{static_cast<uint16_t>(word)}); }
  static float High(uint32_t word) { return Low(word >> 16); }
  static float Round(float x) { return Low(Pack(x, 0)); }
};

// ---- fragments

inline void LoadMatrices(uint32_t (&words)[4], uint32_t row,
                         Location where = Location::current()) {
  const auto loaded = emulator::LoadMatrices(row, /*transposed=*/false, where);
  std::copy(loaded.begin(), loaded.end(), words);
}
inline void LoadMatricesTransposed(uint32_t (&words)[4], uint32_t row,
                                   Location where = Location::current()) {
  const auto loaded = emulator::LoadMatrices(row, /*transposed=*/true, where);
  std::copy(loaded.begin(), loaded.end(), words);
}
inline void StoreMatrices(uint32_t row, const uint32_t (&words)[4],
                          Location where = Location::current()) {
  emulator::StoreMatrices(row, {words[0], words[1], words[2], words[3]}, where);
}
template <class Element>
void MultiplyFragments(float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       Location where = Location::current()) {
  emulator::MultiplyFragments(sums, {a[0], a[1], a[2], a[3]}, {b0, b1},
                              Element::kIsBf16, where);
}

// ---- grids

inline void BeginGrid() {}
inline void NoteTile(int) {}

// ---- warpgroup products

template <int kRegisters>
void IncreaseRegisters() {}
template <int kRegisters>
void DecreaseRegisters() {}
template <int kCount>
void PinRegisters(float (&)[kCount]) {}
inline void PinBeforeWait(float, float) {}
constexpr bool kDelaysSums = true;

// The low word of a descriptor's matrix in shared memory.
inline uint32_t DescriptorStart(const void* shared) {
  return SharedAddress(shared) >> 4;
}
inline uint64_t Descriptor(uint32_t low, uint32_t high) {
  return static_cast<uint64_t>(high) << 32 | low;
}
inline void WgmmaFence(Location where = Location::current()) {
  emulator::WgmmaFence(where);
}
inline void WgmmaCommit(Location where = Location::current()) {
  emulator::WgmmaCommit(where);
}
template <int kGroups>
void WgmmaWait(Location where = Location::current()) {
  emulator::WgmmaWait(kGroups, where);
}
template <class Element, int kCount>
void WgmmaShared(float (&sums)[kCount], uint64_t a, uint64_t b, bool accumulate,
                 Location where = Location::current()) {
  emulator::IssueProduct({2 * kCount, false, Element::kIsBf16}, sums, accumulate, a,
                         nullptr, b, where);
}
template <class Element, int kCount>
void WgmmaRegisters(float (&sums)[kCount], const uint32_t (&a)[4], uint64_t b,
                    Location where = Location::current()) {
  const std::array<uint32_t, 4> registers = {a[0], a[1], a[2], a[3]};
  emulator::IssueProduct({2 * kCount, true, Element::kIsBf16}, sums, true, 0,
                         &registers, b, where);
}

}  // namespace pbs::cuda
