// Spec: the means of query blocks that a model's layer makes while it rotates queries.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "cuda/model/model_launches.h"
#include "tests/emulator/pipeline_run.h"

namespace pbs::emulator {
namespace {

// Queries, keys and values as a model's layer leaves them: token-major queries, and
// their means, made on the way.
template <int kHeadDim>
class PooledInputs {
 public:
  explicit PooledInputs(const AttentionProblem& problem)
      : geometry_(MakeGeometry(problem)),
        qkv_(sequence().q_len * (heads() + 2 * kv_heads()) * kHeadDim, true),
        cosines_(sequence().q_len * kHeadDim / 2, true),
        sines_(sequence().q_len * kHeadDim / 2, true),
        q_(sequence().q_len * heads() * kHeadDim),
        k_(kv_heads() * sequence().k_len * kHeadDim, true),
        v_(kv_heads() * sequence().k_len * kHeadDim, true),
        o_(sequence().q_len * heads() * kHeadDim),
        means_(sequence().num_query_blocks * heads() * kHeadDim) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal(0.0f, 1.5f);
    for (DeviceArray<uint16_t>* array : {&qkv_, &k_, &v_}) {
      for (int64_t i = 0; i < array->bytes() / 2; ++i) {
        array->data()[i] = ToBf16(normal(random)).bits;
      }
      array->Allow();
    }
    for (DeviceArray<float>* array : {&cosines_, &sines_}) {
      for (int64_t i = 0; i < array->bytes() / 4; ++i) {
        array->data()[i] = 0.5f * normal(random);
      }
      array->Allow();
    }
    q_.Allow();
    o_.Allow();
    means_.Allow();
  }

  Fault Make() {
    const int64_t first = sequence().query_offset * kHeadDim;
    EmulatorLauncher launch;
    cuda::EnqueueQkv({.qkv = qkv_.data(),
                      .qkv_dtype = DType::kBF16,
                      .rows = sequence().q_len,
                      .num_heads = geometry_.num_heads,
                      .num_kv_heads = geometry_.num_kv_heads,
                      .head_dim = kHeadDim,
                      .cosines = cosines_.data(),
                      .sines = sines_.data(),
                      .kv_dtype = DType::kBF16,
                      .q = q_.data(),
                      .k = k_.data() + first,
                      .v = v_.data() + first,
                      .kv_head_stride = int64_t{sequence().k_len} * kHeadDim,
                      .pooled_queries = means_.data(),
                      .block_size = geometry_.block_size,
                      .row_in_block = sequence().query_offset % geometry_.block_size},
                     launch);
    return launch.fault;
  }

  AttentionTensors Tensors() {
    const RowLayout token_major = TokenMajorLayout(heads() * kHeadDim, kHeadDim);
    AttentionTensors tensors;
    tensors.q = {q_.data(), token_major};
    tensors.k = {k_.data(), PackedLayout(sequence().k_len, kHeadDim)};
    tensors.v = {v_.data(), PackedLayout(sequence().k_len, kHeadDim)};
    tensors.o = {o_.data(), token_major};
    tensors.pooled_queries = means_.data();
    return tensors;
  }
  std::vector<uint16_t> Outputs() const {
    return {o_.data(), o_.data() + o_.bytes() / 2};
  }
  const DeviceArray<float>& means() const { return means_; }

 private:
  const SequenceGeometry& sequence() const { return geometry_.sequences[0]; }
  int64_t heads() const { return geometry_.num_heads; }
  int64_t kv_heads() const { return geometry_.num_kv_heads; }

  const AttentionGeometry geometry_;
  DeviceArray<uint16_t> qkv_;
  DeviceArray<float> cosines_, sines_;
  DeviceArray<uint16_t> q_, k_, v_, o_;
  DeviceArray<float> means_;
};

// What a run with and one without given means must have in common: everything.
template <int kHeadDim>
void CheckPooled(SequenceShape sequence, const AttentionOptions& options) {
  SCOPED_TRACE(testing::Message() << "head dim " << kHeadDim << ", " << sequence.q_len
                                  << " of " << sequence.k_len << " tokens");
  AttentionProblem problem{{2, 1, kHeadDim, {sequence}}, DType::kBF16, options};
  GlobalMemory::Clear();
  PooledInputs<kHeadDim> inputs(problem);
  const Fault made = inputs.Make();
  ASSERT_TRUE(made.ok()) << made.ToString();
  struct Ran {
    int launches = 0;
    AttentionReport report;
    std::vector<uint16_t> outputs;
    std::vector<float> means;
  };
  const auto run = [&](bool given) {
    problem.offers_pooled_queries = given;
    const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
    EXPECT_TRUE(plan.ok()) << plan.status().ToString();
    const PipelineRun<cuda::Bf16Element, kHeadDim> done(**plan, inputs.Tensors(), 1);
    EXPECT_TRUE(done.fault().ok()) << done.fault().ToString();
    Ran ran;
    ran.launches = done.launches();
    ran.outputs = inputs.Outputs();
    EXPECT_TRUE(done.Report({.order = true, .lists = true}, &ran.report).ok());
    ran.means.resize(inputs.means().bytes() / 4);
    std::memcpy(ran.means.data(),
                given ? static_cast<const void*>(inputs.means().data())
                      : done.workspace() + (*plan)->pooled_queries_at,
                inputs.means().bytes());
    return ran;
  };
  const Ran own = run(false);
  const Ran given = run(true);
  EXPECT_EQ(given.launches, own.launches - 1);
  EXPECT_EQ(given.means, own.means);
  EXPECT_EQ(given.report.order, own.report.order);
  EXPECT_EQ(given.report.lists.count, own.report.lists.count);
  EXPECT_EQ(given.report.lists.indices, own.report.lists.indices);
  EXPECT_EQ(given.outputs, own.outputs);
  EXPECT_LT(own.report.stats.Density(), 1);
}

TEST(PooledQueriesSpec, MadeOnTheWayTheyAreTheBitsThatSelectionWouldMake) {
  CheckPooled<64>({200, 700}, {.threshold = 0.3f});
  CheckPooled<96>({150, 600}, {.threshold = 0.3f, .scope = Scope::kQueryHead});
  CheckPooled<128>({400, 400}, {.method = Method::kMeanPooling, .threshold = 0.4f});
  CheckPooled<256>({70, 600}, {.threshold = 0.3f});
  CheckPooled<64>({300, 500}, {.method = Method::kPrism, .threshold = 0.3f});
}

}  // namespace
}  // namespace pbs::emulator
