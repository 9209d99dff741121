// Spec: cuda/attention/attention_sm80.h and attention_sm90.h, run on the emulator
// against f64.
#include <gtest/gtest.h>

#include "cuda/attention/sm90_variants.h"
#include "tests/emulator/attention_case.h"
#include "tests/emulator/attention_run.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

using cuda::AttentionVariant;
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

// What is chosen for each head dim (cuda/attention/sm90_variants.h), and the others.
template <class Element, int kHeadDim,
          AttentionVariant kVariant = AttentionVariant::kChosen>
constexpr Run kSm90 =
    RunSm90<Sm90Config<Element, kHeadDim, cuda::Sm90OptionsOf(kHeadDim, kVariant)>>;
template <class Element, int kHeadDim>
constexpr Run kSm80 = RunSm80<Sm80Config<Element, kHeadDim>>;

INSTANTIATE_TEST_SUITE_P(
    Sm90, AttentionKernelSpec,
    testing::Values(
        KernelCase{
            "two_blocks", kSm90<Bf16Element, 128>, {.sequences = {{512, 512}}}, 2},
        KernelCase{"one_token", kSm90<Bf16Element, 128>, {.sequences = {{1, 1}}}},
        KernelCase{
            "f16",
            kSm90<F16Element, 128>,
            {.heads = 4, .kv_heads = 2, .sequences = {{300, 300}}, .bf16 = false}},
        KernelCase{"narrow_heads",
                   kSm90<Bf16Element, 64>,
                   {.head_dim = 64, .sequences = {{600, 600}}}},
        KernelCase{"batch_with_offsets",
                   kSm90<Bf16Element, 64>,
                   {.head_dim = 64,
                    .heads = 1,
                    .sequences = {{130, 130}, {70, 333}, {1, 257}}},
                   2},
        KernelCase{"strided_batch",
                   kSm90<Bf16Element, 64>,
                   {.head_dim = 64,
                    .heads = 2,
                    .sequences = {{40, 133}, {150, 150}},
                    .strided = true},
                   2},
        KernelCase{"parts_of_blocks",
                   kSm90<Bf16Element, 64>,
                   {.head_dim = 64,
                    .sequences = {{130, 130}, {300, 800}},
                    .density = 0.9,
                    .parts = true},
                   2},
        KernelCase{"parts_of_blocks_of_wider_heads",
                   kSm90<Bf16Element, 128>,
                   {.sequences = {{500, 500}}, .density = 0.9, .parts = true}},
        KernelCase{"dense",
                   kSm90<Bf16Element, 128>,
                   {.sequences = {{400, 400}}, .arithmetic_lists = true}},
        KernelCase{"many_tiles_of_one_block",
                   kSm90<Bf16Element, 64>,
                   {.head_dim = 64,
                    .heads = 1,
                    .sequences = {{128, 128}, {60, 60}, {128, 128}, {1, 1}},
                    .arithmetic_lists = true}},
        KernelCase{"dense_of_different_lengths_beside_nan",
                   kSm90<Bf16Element, 64>,
                   {.head_dim = 64,
                    .heads = 2,
                    .sequences = {{40, 133}, {300, 300}},
                    .arithmetic_lists = true,
                    .strided = true,
                    .nan_padding = true},
                   2},
        KernelCase{"poison_before_and_behind",
                   kSm90<Bf16Element, 128>,
                   {.sequences = {{70, 130}, {150, 150}, {200, 200}},
                    .arithmetic_lists = true,
                    .poisoned = 1}}),
    testing_support::CaseName());

// Every variant that tests/gpu compares: full tiles and parts of tiles, lists and none.
INSTANTIATE_TEST_SUITE_P(
    Sm90Variants, AttentionKernelSpec,
    testing::Values(
        KernelCase{"values_first",
                   kSm90<Bf16Element, 128, AttentionVariant::kValuesFirst>,
                   {.sequences = {{512, 512}}}},
        KernelCase{"three_stages",
                   kSm90<Bf16Element, 128, AttentionVariant::kMoreStages>,
                   {.sequences = {{700, 700}}, .density = 0.9}},
        KernelCase{"four_stages",
                   kSm90<Bf16Element, 64, AttentionVariant::kMoreStages>,
                   {.head_dim = 64, .sequences = {{700, 700}}, .density = 0.9}},
        KernelCase{"outputs_from_registers",
                   kSm90<Bf16Element, 128, AttentionVariant::kDirectOutputs>,
                   {.sequences = {{384, 384}}}},
        KernelCase{"cache_hints",
                   kSm90<Bf16Element, 64, AttentionVariant::kCacheHints>,
                   {.head_dim = 64, .sequences = {{384, 384}}}},
        KernelCase{"without_turns",
                   kSm90<Bf16Element, 128, AttentionVariant::kWithoutTurns>,
                   {.sequences = {{384, 384}}}},
        KernelCase{"wide_tiles",
                   kSm90<Bf16Element, 64, AttentionVariant::kWideTiles>,
                   {.head_dim = 64,
                    .sequences = {{600, 600}, {250, 331}, {40, 40}},
                    .arithmetic_lists = true,
                    .tile_rows = cuda::kWideTileRows},
                   2}),
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
        KernelCase{"parts_of_blocks",
                   kSm80<Bf16Element, 96>,
                   {.head_dim = 96,
                    .sequences = {{130, 130}, {300, 800}},
                    .density = 0.9,
                    .parts = true}},
        KernelCase{
            "parts_of_blocks_of_wide_heads",
            kSm80<Bf16Element, 256>,
            {.head_dim = 256, .sequences = {{500, 500}}, .density = 0.9, .parts = true},
            2},
        KernelCase{"dense",
                   kSm80<Bf16Element, 128>,
                   {.sequences = {{400, 400}}, .arithmetic_lists = true}},
        KernelCase{"poison_before_and_behind",
                   kSm80<Bf16Element, 96>,
                   {.head_dim = 96,
                    .sequences = {{70, 130}, {150, 150}, {200, 200}},
                    .arithmetic_lists = true,
                    .poisoned = 1}}),
    testing_support::CaseName());

// docs/KERNELS.md, "Hopper" and "Ampere": what decides how many blocks a multiprocessor
// holds.
TEST(SharedMemorySpec, IsWhatTheTablesSay) {
  const auto sm90 = []<int kHeadDim, AttentionVariant kVariant>() {
    return sizeof(
        cuda::Sm90Shared<Sm90Config<Bf16Element, kHeadDim,
                                    cuda::Sm90OptionsOf(kHeadDim, kVariant)>>);
  };
  using enum AttentionVariant;
  EXPECT_LE((sm90.operator()<64, kChosen>()), 131u << 10);
  EXPECT_LE((sm90.operator()<64, kMoreStages>()), 163u << 10);
  EXPECT_LE((sm90.operator()<64, kWideTiles>()), 147u << 10);
  EXPECT_LE((sm90.operator()<128, kChosen>()), 194u << 10);
  EXPECT_LE((sm90.operator()<128, kMoreStages>()), 226u << 10);
  // Two blocks in 164 KiB, one KiB of each being the system's.
  EXPECT_LE(sizeof(cuda::Sm80Shared<Sm80Config<Bf16Element, 64>>), (32u << 10) + 128);
  EXPECT_LE(sizeof(cuda::Sm80Shared<Sm80Config<Bf16Element, 96>>), (48u << 10) + 128);
  EXPECT_LE(sizeof(cuda::Sm80Shared<Sm80Config<Bf16Element, 128>>), (64u << 10) + 128);
  // One block also in the 99 KiB of 8.6 and 8.9.
  EXPECT_LE(sizeof(cuda::Sm80Shared<Sm80Config<Bf16Element, 256>>), (96u << 10) + 128);
}

}  // namespace
}  // namespace pbs::emulator
