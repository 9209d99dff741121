// Spec: cuda/attention/attention_sm90.h, run on the emulator against f64.
#include "cuda/attention/attention_sm90.h"

#include <gtest/gtest.h>

#include "tests/emulator/attention_case.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

using cuda::Bf16Element;
using cuda::F16Element;
using cuda::Sm90Config;

template <class Config>
Fault RunSm90(AttentionCase& attention, uint32_t seed, int blocks) {
  const cuda::AttentionParams params = attention.Params();
  const cuda::Sm90Operands operands = {attention.QMap(), attention.KMap(),
                                       attention.VMap()};
  return Launch({.blocks = blocks,
                 .threads = Config::kThreads,
                 .resident_blocks = blocks,
                 .shared_bytes = sizeof(cuda::Sm90Shared<Config>),
                 .seed = seed},
                [&] { cuda::AttendSm90<Config>(params, operands); });
}

using Run = Fault (*)(AttentionCase&, uint32_t, int);

struct Sm90Case {
  const char* name;
  Run run;
  AttentionSetting setting;
  int blocks;
};

void PrintTo(const Sm90Case& c, std::ostream* out) { *out << c.name; }

class Sm90Spec : public testing::TestWithParam<Sm90Case> {};

TEST_P(Sm90Spec, EqualsTheExactAnswerOverTheSameLists) {
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
constexpr Run kRun = RunSm90<Sm90Config<Element, kHeadDim, kStages, kPingPong>>;

INSTANTIATE_TEST_SUITE_P(
    Cases, Sm90Spec,
    testing::Values(
        Sm90Case{"two_blocks",
                 kRun<Bf16Element, 128, 2, true>,
                 {.sequences = {{512, 512}}},
                 2},
        Sm90Case{
            "one_token", kRun<Bf16Element, 128, 2, true>, {.sequences = {{1, 1}}}, 1},
        Sm90Case{"f16_without_turns",
                 kRun<F16Element, 128, 2, false>,
                 {.heads = 4, .kv_heads = 2, .sequences = {{300, 300}}, .bf16 = false},
                 1},
        Sm90Case{"narrow_heads",
                 kRun<Bf16Element, 64, 3, true>,
                 {.head_dim = 64, .sequences = {{600, 600}}},
                 1},
        Sm90Case{"batch_with_offsets",
                 kRun<Bf16Element, 64, 3, true>,
                 {.head_dim = 64,
                  .heads = 1,
                  .sequences = {{130, 130}, {70, 333}, {1, 257}}},
                 2},
        Sm90Case{"dense",
                 kRun<Bf16Element, 128, 2, true>,
                 {.sequences = {{400, 400}}, .arithmetic_lists = true},
                 1},
        Sm90Case{"rows_mapped_back",
                 kRun<Bf16Element, 64, 3, true>,
                 {.head_dim = 64, .sequences = {{384, 384}}, .map_rows = true},
                 1}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::emulator
