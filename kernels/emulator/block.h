// The state that all threads of one emulated block share. Internal to this folder.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#include "emulator/machine.h"

namespace pbs::emulator {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kNamedBarriers = 16;

// Threads that wait for each other. `rounds` increases when the last of them has
// arrived.
struct Gathering {
  int expected = 0;
  int arrived = 0;
  int64_t rounds = 0;

  // True for the last one.
  bool Arrive() {
    if (++arrived < expected) return false;
    arrived = 0;
    ++rounds;
    return true;
  }
};

struct Mbarrier {
  int arrivals = 0;  // of a phase
  int missing = 0;
  int64_t bytes = 0;  // announced and not yet arrived; negative when they arrive first
  int64_t phases = 0;
};

// A warpgroup product between its issue and its end.
struct Product {
  uint64_t a_descriptor = 0;
  uint64_t b_descriptor = 0;
  int columns = 0;
  bool b_transposed = false;  // MN-major
  bool bf16 = false;
  bool a_in_registers = false;
  int issued = 0;  // threads that have issued it
  struct Thread {
    float* sums = nullptr;
    bool accumulate = false;
    std::array<uint32_t, 4> a{};
  };
  std::array<Thread, kWarpgroupThreads> threads;
  Location where;
};

struct Warpgroup {
  std::deque<Product> products;                     // oldest first; not yet computed
  int64_t first_product = 0;                        // number of products.front()
  int64_t computed = 0;                             // products that are done
  std::array<int64_t, kWarpgroupThreads> issued{};  // products, by thread
  std::map<int64_t, int> commits;  // of a group, by its end number: threads
  std::deque<int64_t> committed;   // end numbers of groups under way
  std::array<std::vector<int64_t>, kWarpgroupThreads> groups;  // committed: end numbers
  std::array<bool, kWarpgroupThreads> fenced{};
  // Sums under way, by thread and register array; the registers themselves are NaN.
  std::array<std::map<float*, std::vector<float>>, kWarpgroupThreads> sums;
};

// A thread's own copies: how many of each group are under way. The last group is open.
struct AsyncCopies {
  std::deque<int64_t> under_way = {0};  // grows and shrinks at its ends only

  void Commit() { under_way.push_back(0); }
};

// The range in which a thread may have written shared memory since its last proxy
// fence.
struct WrittenSpan {
  int64_t begin = INT64_MAX;
  int64_t end = 0;
};

struct Block {
  int index = 0;
  std::vector<uint8_t> storage;
  uint8_t* shared = nullptr;  // 1024-byte aligned, inside storage
  int64_t shared_bytes = 0;
  std::vector<bool> written;  // of shared
  // For each byte: 1 + the thread that wrote it without a proxy fence since; 0: none.
  std::vector<uint16_t> unfenced;
  int running = 0;  // threads that have not returned
  int late_operations = 0;

  Gathering all;
  std::array<Gathering, kNamedBarriers> named;
  std::vector<Gathering> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<std::array<void*, kWarpThreads>> warp_parts{};
  std::vector<AsyncCopies> copies;  // by thread
  std::vector<AsyncCopies> stores;  // by thread; the groups' stores that yet read
  std::vector<WrittenSpan> spans;   // by thread
  std::map<const void*, Mbarrier> mbarriers;
};

inline Block& OwnBlock() { return *Self().block; }

}  // namespace pbs::emulator
