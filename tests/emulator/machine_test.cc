// Spec: machine.h, synchronization.h, async.h. What a kernel may do works; what it must
// not do is named, with the thread and the line.
#include "emulator/machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "emulator/primitives.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

using testing::HasSubstr;

struct FaultyCase {
  const char* name;
  void (*kernel)();
  const char* what;
  int threads = 64;
};

void PrintTo(const FaultyCase& c, std::ostream* out) { *out << c.name; }

class FaultSpec : public testing::TestWithParam<FaultyCase> {};

TEST_P(FaultSpec, IsReportedWithItsLine) {
  for (uint32_t seed = 1; seed <= 3; ++seed) {
    GlobalMemory::Clear();
    const Fault fault =
        Launch({.threads = GetParam().threads, .shared_bytes = 64 << 10, .seed = seed},
               GetParam().kernel);
    EXPECT_THAT(fault.what, HasSubstr(GetParam().what)) << "seed " << seed;
    EXPECT_THAT(fault.where, HasSubstr("machine_test.cc:")) << "seed " << seed;
    EXPECT_GE(fault.thread, 0);
  }
}

cuda::Mbarrier* Barrier() {
  return reinterpret_cast<cuda::Mbarrier*>(cuda::SharedMemory());
}
float* Shared() { return reinterpret_cast<float*>(cuda::SharedMemory() + 1024); }
alignas(16) float outside[4];

// Rows of shared memory to a tensor that is nowhere.
void StoreOneBox(bool fenced) {
  for (int i = 0; i < 64; ++i) {
    cuda::StoreShared(Shared() + cuda::ThreadIndex() * 64 + i, 1.0f);
  }
  if (fenced) cuda::ProxyFence();
  cuda::SyncThreads();
  if (cuda::ThreadIndex() != 0) return;
  cuda::StoreBox(TensorMap{.box_rows = 64}, Shared(), 0, 0, 0, 0);
  cuda::StoreCommit();
  if (!fenced) cuda::StoreWaitRead();
}

INSTANTIATE_TEST_SUITE_P(
    Cases, FaultSpec,
    testing::Values(
        FaultyCase{"deadlock_in_a_named_barrier",
                   [] {
                     if (cuda::ThreadIndex() < 32) cuda::BarrierSync(1, 64);
                   },
                   "deadlock: 32 threads in a named barrier"},
        FaultyCase{"threads_disagree_on_a_count",
                   [] { cuda::BarrierSync(1, cuda::ThreadIndex() < 32 ? 64 : 32); },
                   "barrier 1 gathers"},
        FaultyCase{"barrier_id", [] { cuda::BarrierSync(16, 64); },
                   "barrier 16 is outside [0, 15]"},
        FaultyCase{"uninitialised_transaction_barrier",
                   [] { cuda::MbarrierArrive(Barrier()); },
                   "used before it is initialised"},
        FaultyCase{"too_many_arrivals",
                   [] {
                     if (cuda::ThreadIndex() != 0) return;
                     cuda::MbarrierInit(Barrier(), 1);
                     cuda::MbarrierArriveExpect(Barrier(), 128);
                     cuda::MbarrierArrive(Barrier());
                   },
                   "more arrivals than a phase"},
        FaultyCase{"bytes_that_never_come",
                   [] {
                     if (cuda::ThreadIndex() == 0) {
                       cuda::MbarrierInit(Barrier(), 1);
                       cuda::MbarrierArriveExpect(Barrier(), 128);
                     }
                     cuda::SyncThreads();
                     cuda::MbarrierWait(Barrier(), 0);
                   },
                   "deadlock: 64 threads in a transaction barrier"},
        FaultyCase{"shared_memory_that_nothing_wrote",
                   [] { cuda::LoadShared(Shared()); }, "read before they are written"},
        FaultyCase{"past_the_end_of_shared_memory",
                   [] { cuda::StoreShared(Shared() + (63 << 8), 1.0f); },
                   "leave the 65536 bytes of shared memory"},
        FaultyCase{"memory_of_no_tensor", [] { cuda::LoadGlobal(outside); },
                   "are in no global tensor"},
        FaultyCase{"product_without_a_fence",
                   [] {
                     float sums[32];
                     cuda::WgmmaShared<cuda::Bf16Element>(sums, 1ull << 62, 1ull << 62,
                                                          false);
                   },
                   "a product without a fence", 128},
        FaultyCase{"product_of_unwritten_memory",
                   [] {
                     float sums[32];
                     cuda::WgmmaFence();
                     cuda::WgmmaShared<cuda::Bf16Element>(sums, 1ull << 62, 1ull << 62,
                                                          false);
                     cuda::WgmmaCommit();
                     cuda::WgmmaWait<0>();
                   },
                   "read before they are written", 128},
        FaultyCase{"matrix_of_rows_in_the_same_banks",
                   [] {
                     const int row = cuda::ThreadIndex() % 32;
                     for (int i = 0; i < 16; i += 4) {
                       cuda::StoreShared(Shared() + row * 32 + i / 4, 1.0f);
                     }
                     uint32_t words[4];
                     cuda::LoadMatrices(words,
                                        cuda::SharedAddress(Shared() + row * 32));
                   },
                   "in the same banks", 32},
        FaultyCase{"copy_that_nothing_waits_for",
                   [] {
                     cuda::CopyAsync16(cuda::SharedAddress(Shared()), nullptr, false);
                     cuda::CopyAsyncWait<0>();  // there is no group
                     cuda::LoadShared(Shared());
                   },
                   "read before they are written", 32},
        FaultyCase{"copy_to_a_misaligned_target",
                   [] {
                     if (cuda::ThreadIndex() != 0) return;
                     cuda::MbarrierInit(Barrier(), 1);
                     cuda::CopyBox(cuda::SharedMemory() + 1040, TensorMap{}, Barrier(),
                                   0, 0, 0, 0);
                   },
                   "not 1024-byte aligned"},
        FaultyCase{"copy_of_bytes_that_are_no_words",
                   [] {
                     if (cuda::ThreadIndex() != 0) return;
                     cuda::MbarrierInit(Barrier(), 1);
                     cuda::CopyBytes(Shared(), outside, 8, Barrier());
                   },
                   "not a multiple of 16"},
        FaultyCase{"store_of_what_was_written_without_a_proxy_fence",
                   [] { StoreOneBox(/*fenced=*/false); },
                   "wrote to shared memory is read by a copy or a product without a "
                   "proxy fence",
                   32},
        FaultyCase{"product_of_what_was_written_without_a_proxy_fence",
                   [] {
                     for (int i = 0; i < 64; ++i) {
                       cuda::StoreShared(Shared() + cuda::ThreadIndex() * 64 + i, 1.0f);
                     }
                     cuda::SyncThreads();
                     float sums[32];
                     const uint64_t matrix =
                         cuda::Descriptor(cuda::DescriptorStart(Shared()) | 1u << 16,
                                          1u << 30 | 1024 >> 4);
                     cuda::WgmmaFence();
                     cuda::WgmmaShared<cuda::Bf16Element>(sums, matrix, matrix, false);
                     cuda::WgmmaCommit();
                     cuda::WgmmaWait<0>();
                   },
                   "without a proxy fence", 128}),
    testing_support::CaseName());

// What no thread did when it was due is told of the thread that should have.
TEST(MachineSpec, ABlockMayNotEndBeforeWhatItAskedFor) {
  struct {
    const char* name;
    int threads;
    void (*kernel)();
  } const cases[] = {{"stores", 32, [] { StoreOneBox(/*fenced=*/true); }},
                     {"products", 128, [] {
                        float sums[32];
                        cuda::WgmmaFence();
                        cuda::WgmmaShared<cuda::Bf16Element>(sums, 1ull << 62,
                                                             1ull << 62, false);
                        cuda::WgmmaCommit();
                      }}};
  for (const auto& c : cases) {
    const Fault fault =
        Launch({.threads = c.threads, .shared_bytes = 64 << 10, .seed = 2}, c.kernel);
    EXPECT_THAT(fault.what, HasSubstr("under way when the block ended")) << c.name;
  }
}

TEST(MachineSpec, ThreadsExchangeWordsAndMeet) {
  const Fault fault = Launch({.threads = 96, .shared_bytes = 4096}, [] {
    const int lane = cuda::ThreadIndex() % 32;
    int sum = lane;
    for (int mask = 1; mask < 32; mask *= 2) sum += cuda::ShuffleXor(sum, mask);
    if (sum != 31 * 32 / 2) Fail("wrong sum", Location::current());
    auto* slot = reinterpret_cast<int*>(cuda::SharedMemory()) + cuda::ThreadIndex();
    cuda::StoreShared(slot, sum + cuda::ThreadIndex());
    cuda::SyncThreads();
    const int next = (cuda::ThreadIndex() + 1) % 96;
    const int read =
        cuda::LoadShared(reinterpret_cast<int*>(cuda::SharedMemory()) + next);
    if (read != sum + next) Fail("wrong neighbour", Location::current());
  });
  EXPECT_TRUE(fault.ok()) << fault.ToString();
}

TEST(MachineSpec, BlocksRunToTheirEndWhateverIsResident) {
  for (int resident : {1, 3, 8}) {
    int32_t counter = 0;
    GlobalMemory::Clear();
    GlobalMemory::Allow(&counter, 4, true);
    const Fault fault =
        Launch({.blocks = 8, .threads = 32, .resident_blocks = resident},
               [&] { cuda::AtomicAdd(&counter, 1); });
    EXPECT_TRUE(fault.ok()) << fault.ToString();
    EXPECT_EQ(counter, 8 * 32);
  }
}

}  // namespace
}  // namespace pbs::emulator
