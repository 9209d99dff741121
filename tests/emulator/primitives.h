// The host's half of cuda/primitives/primitives.h: the same names, for kernel source
// that the emulator runs. See ptx.h for what each does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "pbs/dtype.h"
#include "tests/emulator/async.h"
#include "tests/emulator/machine.h"
#include "tests/emulator/synchronization.h"

#define PBS_DEVICE inline
#define PBS_GRID_CONSTANT
#define PBS_UNROLL
#define PBS_NO_UNROLL

namespace pbs::cuda {

using emulator::Location;
using emulator::TensorMap;

// ---- who am I

inline int ThreadIndex() { return emulator::ThreadIndex(); }
inline int BlockIndex() { return emulator::BlockIndex(); }
inline uint8_t* SharedMemory() { return emulator::SharedBase(); }

// ---- warps

template <class T>
T Shuffle(T value, int lane, Location where = Location::current()) {
  static_assert(sizeof(T) == 4);
  emulator::Words words{};
  std::memcpy(words.data(), &value, 4);
  words = emulator::Exchange(words, lane, where);
  std::memcpy(&value, words.data(), 4);
  return value;
}
template <class T>
T ShuffleXor(T value, int mask, Location where = Location::current()) {
  return Shuffle(value, (ThreadIndex() % 32) ^ mask, where);
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
                    int row, int head, Location where = Location::current()) {
  emulator::CopyBox(target, map, &barrier->word, column, row, head, where);
}

// ---- memory

template <class T>
T LoadGlobal(const T* at, Location where = Location::current()) {
  emulator::GlobalMemory::CheckRead(at, sizeof(T), alignof(T), where);
  return *at;
}
template <class T>
void StoreGlobal(T* at, const T& value, Location where = Location::current()) {
  emulator::GlobalMemory::CheckWrite(at, sizeof(T), alignof(T), where);
  *at = value;
}
inline int32_t AtomicAdd(int32_t* at, int32_t value,
                         Location where = Location::current()) {
  emulator::GlobalMemory::CheckRead(at, 4, 4, where);
  const int32_t before = *at;
  *at += value;
  return before;
}
template <class T>
T LoadShared(const T* at, Location where = Location::current()) {
  emulator::CheckReadable(at, sizeof(T), where);
  return *at;
}
template <class T>
void StoreShared(T* at, const T& value, Location where = Location::current()) {
  *at = value;
  emulator::MarkWritten(at, sizeof(T), where);
}

// ---- arithmetic

struct alignas(8) Int2 {
  int32_t x, y;
};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.693147180559945309f;
inline float Max(float a, float b) { return std::fmax(a, b); }
inline float Exp2(float x) { return std::exp2(x); }
inline float Log2(float x) { return std::log2(x); }

struct Bf16Element {
  static constexpr bool kIsBf16 = true;
  static uint32_t Pack(float low, float high) {
    return ToBf16(low).bits | static_cast<uint32_t>(ToBf16(high).bits) << 16;
  }
};
struct F16Element {
  static constexpr bool kIsBf16 = false;
  static uint32_t Pack(float low, float high) {
    return ToF16(low).bits | static_cast<uint32_t>(ToF16(high).bits) << 16;
  }
};

// ---- warpgroup products

template <int kRegisters>
void IncreaseRegisters() {}
template <int kRegisters>
void DecreaseRegisters() {}
template <int kCount>
void PinRegisters(float (&)[kCount]) {}
inline void PinBeforeWait(float, float) {}

// The low word of a descriptor's matrix in shared memory.
inline uint32_t DescriptorStart(const void* shared) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(shared) - SharedMemory()) >>
         4;
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
