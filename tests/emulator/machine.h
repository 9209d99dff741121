// A GPU that runs kernel source on the host, for tests: one fiber per CUDA thread, run
// in seeded random order, with the faults that a GPU does not report.
//
// What it models: thread blocks, named and transaction barriers, shuffles, shared
// memory that is poisoned until written, TMA boxes and warpgroup products that complete
// late (primitives in this folder). What it does not: time, caches, register pressure.
//
// A run ends when every thread has returned, or with the first Fault. A deadlock is
// one.
//
// Threading: one machine per OS thread at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace pbs::emulator {

using Location = std::source_location;

struct Fault {
  std::string what;  // "" when the run was clean
  int block = -1;
  int thread = -1;
  std::string where = {};  // file:line of the kernel source

  bool ok() const { return what.empty(); }
  std::string ToString() const;
};

struct LaunchShape {
  int blocks = 1;
  int threads = 1;           // per block
  int resident_blocks = 1;   // run side by side
  int64_t shared_bytes = 0;  // per block
  uint32_t seed = 1;         // of every random choice
  int64_t stack_bytes = 64 << 10;
};

// Runs `body` in every thread of the grid; returns the first fault.
Fault Launch(const LaunchShape& shape, const std::function<void()>& body);

// For primitives: all of the following concern the thread that calls.

struct Block;

struct ThreadState {
  Block* block = nullptr;
  int index = 0;  // in the block
};

const ThreadState& Self();
int ThreadIndex();
int BlockIndex();
int NumBlocks();
// Grows with every call, of any machine.
int64_t GlobalTimer();

// Ends the run.
[[noreturn]] void Fail(const std::string& what, const Location& where);

// Returns when *counter != value; other threads run meanwhile. `what` and `where` are
// told should that never happen.
void WaitWhileEqual(const int64_t* counter, int64_t value, const char* what,
                    const Location& where);

// Lets other threads run now and then, where the hardware may.
void Preempt();

// Lets an operation of the calling thread happen later, at a random moment. A block
// must not end before it has.
void Later(std::function<void()> operation);

// Shared memory of the calling thread's block.
uint8_t* SharedBase();
int64_t SharedBytes();
// Marks bytes as holding values, or as not; faults when one that is read does not.
// Written by the thread itself: copies and products (MarkCopied() is their mark, what
// they read CheckFenced()) see it behind the thread's next ProxyFence() only.
void MarkWritten(const void* at, int64_t bytes, const Location& where);
void MarkCopied(const void* at, int64_t bytes, const Location& where);
void CheckFenced(const void* at, int64_t bytes, const Location& where);
void ProxyFence();
void Poison(const void* at, int64_t bytes, const Location& where);
void CheckReadable(const void* at, int64_t bytes, const Location& where);
bool IsShared(const void* at);

// Global memory that kernels may touch.
class GlobalMemory {
 public:
  // Adds [at, at + bytes); it stays until Forbid(at) or Clear().
  static void Allow(const void* at, int64_t bytes, bool written);
  static void Forbid(const void* at);
  // What somebody else than a kernel writes; a fault when kernels may not touch it.
  static Fault MarkWritten(const void* at, int64_t bytes);
  // For somebody else than a kernel who reads: a fault when it is nobody's memory.
  static Fault CheckAllowed(const void* at, int64_t bytes);
  static void Clear();
  static void CheckRead(const void* at, int64_t bytes, int64_t alignment,
                        const Location& where);
  static void CheckWrite(void* at, int64_t bytes, int64_t alignment,
                         const Location& where);
};

}  // namespace pbs::emulator
