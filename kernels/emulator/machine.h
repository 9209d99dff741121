// An emulated GPU that runs kernel source on the host, for tests. It has one fiber per
// CUDA thread, runs them in seeded random order, and reports faults that a GPU does not
// report.
//
// It models thread blocks, named and transaction barriers, shuffles, shared memory that
// is poisoned until written, and TMA boxes and warpgroup products that complete late
// (primitives in this folder). It does not model time, caches or register pressure.
//
// A run ends when every thread has returned, or with the first Fault. A deadlock is a
// Fault.
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

// Functions for primitives. All of them concern the calling thread.

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

// Returns when *counter != value; other threads run meanwhile. The Fault of a deadlock
// has `what` and `where`.
void WaitWhileEqual(const int64_t* counter, int64_t value, const char* what,
                    const Location& where);

// Lets other threads run now and then, where the hardware may.
void Preempt();

// Runs an operation of the calling thread later, at a random moment. A block must not
// end before that.
void Later(std::function<void()> operation);

// Shared memory of the calling thread's block.
uint8_t* SharedBase();
int64_t SharedBytes();
// Marks bytes as holding values, or not; checks that read bytes hold values, else a
// Fault. MarkWritten() is for writes of the thread itself, which copies and products
// see only after the thread's next ProxyFence(). MarkCopied() is for writes of copies,
// and CheckFenced() for reads of copies and products.
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
  // Marks bytes that other code than a kernel writes; a fault when kernels may not
  // touch them.
  static Fault MarkWritten(const void* at, int64_t bytes);
  // Checks bytes that other code than a kernel reads; a fault when kernels may not
  // touch them.
  static Fault CheckAllowed(const void* at, int64_t bytes);
  static void Clear();
  static void CheckRead(const void* at, int64_t bytes, int64_t alignment,
                        const Location& where);
  static void CheckWrite(void* at, int64_t bytes, int64_t alignment,
                         const Location& where);
};

}  // namespace pbs::emulator
