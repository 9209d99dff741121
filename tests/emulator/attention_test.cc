// Spec: cuda/attention/attention_sm80.h and attention_sm90.h, run on the emulator
// against f64.
#include <gtest/gtest.h>

#include "tests/emulator/attention_case.h"
#include "tests/emulator/attention_run.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

using cuda::Bf16Element;
using cuda::F16Element;
using cuda::Sm80Config;
using cuda::Sm90Config;

using Run = Fault (*)(AttentionCase&, uint32_t, int);

struct KernelCase {
  const char* name;
  Run run;
  AttentionSetting setting;
  int blocks = 1;  // resident
};

void PrintTo(const KernelCase& c, std::ostream* out) { *out << c.name; }

class AttentionKernelSpec : public testing::TestWithParam<KernelCase> {};

TEST_P(AttentionKernelSpec, EqualsTheExactAnswerOverTheSameLists) {
  for (uint32_t seed = 1; seed <= 2; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    AttentionSetting setting = GetParam().setting;
    setting.seed = seed;
    AttentionCase attention(setting);
    const Fault fault = GetParam().run(attention, seed, GetParam().blocks);
    ASSERT_TRUE(fault.ok()) << fault.ToString();
    const AttentionCase::Errors errors = attention.Compare();
    EXPECT_LE(errors.o, setting.bf16 ? 2e-2 : 4e-3);
    EXPECT_LE(errors.lse, 1e-5);
  }
}

template <class Element, int kHeadDim, int kStages, bool kPingPong>
constexpr Run kSm90 = RunSm90<Sm90Config<Element, kHeadDim, kStages, kPingPong>>;
template <class Element, int kHeadDim>
constexpr Run kSm80 = RunSm80<Sm80Config<Element, kHeadDim>>;

INSTANTIATE_TEST_SUITE_P(
    Sm90, AttentionKernelSpec,
    testing::Values(
        KernelCase{"two_blocks",
                   kSm90<Bf16Element, 128, 2, true>,
                   {.sequences = {{512, 512}}},
                   2},
        KernelCase{
            "one_token", kSm90<Bf16Element, 128, 2, true>, {.sequences = {{1, 1}}}},
        KernelCase{
            "f16_without_turns",
            kSm90<F16Element, 128, 2, false>,
            {.heads = 4, .kv_heads = 2, .sequences = {{300, 300}}, .bf16 = false}},
        KernelCase{"narrow_heads",
                   kSm90<Bf16Element, 64, 3, true>,
                   {.head_dim = 64, .sequences = {{600, 600}}}},
        KernelCase{"batch_with_offsets",
                   kSm90<Bf16Element, 64, 3, true>,
                   {.head_dim = 64,
                    .heads = 1,
                    .sequences = {{130, 130}, {70, 333}, {1, 257}}},
                   2},
        KernelCase{"strided_batch",
                   kSm90<Bf16Element, 64, 3, true>,
                   {.head_dim = 64,
                    .heads = 2,
                    .sequences = {{40, 133}, {150, 150}},
                    .strided = true},
                   2},
        KernelCase{"dense",
                   kSm90<Bf16Element, 128, 2, true>,
                   {.sequences = {{400, 400}}, .arithmetic_lists = true}},
        KernelCase{"rows_mapped_back",
                   kSm90<Bf16Element, 64, 3, true>,
                   {.head_dim = 64, .sequences = {{384, 384}}, .map_rows = true}}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Sm80, AttentionKernelSpec,
    testing::Values(
        KernelCase{
            "two_blocks", kSm80<Bf16Element, 128>, {.sequences = {{512, 512}}}, 2},
        KernelCase{"one_token", kSm80<Bf16Element, 128>, {.sequences = {{1, 1}}}},
        KernelCase{
            "f16",
            kSm80<F16Element, 128>,
            {.heads = 4, .kv_heads = 2, .sequences = {{300, 300}}, .bf16 = false}},
        KernelCase{"narrow_heads",
                   kSm80<Bf16Element, 64>,
                   {.head_dim = 64, .sequences = {{600, 600}}}},
        KernelCase{"ninety_six",
                   kSm80<Bf16Element, 96>,
                   {.head_dim = 96, .sequences = {{400, 400}}}},
        KernelCase{"wide_heads",
                   kSm80<Bf16Element, 256>,
                   {.head_dim = 256, .heads = 1, .sequences = {{300, 300}}},
                   2},
        KernelCase{"batch_with_offsets",
                   kSm80<Bf16Element, 64>,
                   {.head_dim = 64,
                    .heads = 1,
                    .sequences = {{130, 130}, {70, 333}, {1, 257}}},
                   2},
        KernelCase{"strided_batch",
                   kSm80<Bf16Element, 96>,
                   {.head_dim = 96,
                    .heads = 2,
                    .sequences = {{40, 133}, {150, 150}},
                    .strided = true,
                    .nan_padding = true}},
        KernelCase{"dense",
                   kSm80<Bf16Element, 128>,
                   {.sequences = {{400, 400}}, .arithmetic_lists = true}},
        KernelCase{"rows_mapped_back",
                   kSm80<Bf16Element, 64>,
                   {.head_dim = 64, .sequences = {{384, 384}}, .map_rows = true}}),
    testing_support::CaseName());

// docs/KERNELS.md, "Hopper" and "Ampere": what decides how many blocks a multiprocessor
// holds.
TEST(SharedMemorySpec, IsWhatTheTablesSay) {
  EXPECT_LE(sizeof(cuda::Sm90Shared<Sm90Config<Bf16Element, 64, 3, true>>), 113u << 10);
  EXPECT_LE(sizeof(cuda::Sm90Shared<Sm90Config<Bf16Element, 128, 2, true>>),
            161u << 10);
  // Two blocks in 164 KiB, one KiB of each being the system's.
  EXPECT_LE(sizeof(cuda::Sm80Shared<Sm80Config<Bf16Element, 64>>), (32u << 10) + 128);
  EXPECT_LE(sizeof(cuda::Sm80Shared<Sm80Config<Bf16Element, 96>>), (48u << 10) + 128);
  EXPECT_LE(sizeof(cuda::Sm80Shared<Sm80Config<Bf16Element, 128>>), (64u << 10) + 128);
  // One block also in the 99 KiB of 8.6 and 8.9.
  EXPECT_LE(sizeof(cuda::Sm80Shared<Sm80Config<Bf16Element, 256>>), (96u << 10) + 128);
}

}  // namespace
}  // namespace pbs::emulator
