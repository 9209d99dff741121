// Spec: attention.proto over real gRPC. The backend, called directly, is the oracle:
// the way over the wire must not change a bit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "pbs/v1/attention.grpc.pb.h"
#include "server/codec/attention_options.h"
#include "tests/integration/test_node.h"
#include "tests/support/attention_matrix.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using Tensors = std::map<v1::TensorName, std::vector<std::byte>>;

struct Reply final : client::TensorTarget {
  std::span<std::byte> Tensor(const v1::TensorSpec& spec, int64_t bytes) override {
    shapes[spec.tensor()] = {spec.shape().begin(), spec.shape().end()};
    auto& tensor = tensors[spec.tensor()];
    tensor.resize(static_cast<size_t>(bytes));
    return tensor;
  }
  template <class T>
  std::vector<T> As(v1::TensorName tensor) const {
    const auto& bytes = tensors.at(tensor);
    std::vector<T> values(bytes.size() / sizeof(T));
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  Tensors tensors;
  std::map<v1::TensorName, std::vector<int64_t>> shapes;
};

std::vector<std::byte> RandomTensor(int64_t count, DType dtype, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  std::vector<std::byte> bytes(values.size() * static_cast<size_t>(DTypeBytes(dtype)));
  ConvertElements(values.data(), DType::kF32, bytes.data(), dtype, count);
  return bytes;
}

v1::TensorSpec SpecOf(v1::TensorName tensor, v1::DType dtype,
                      std::initializer_list<int64_t> shape) {
  v1::TensorSpec spec;
  spec.set_tensor(tensor);
  spec.set_dtype(dtype);
  for (int64_t axis : shape) spec.add_shape(axis);
  return spec;
}

// An Attend and the same problem for the backend.
struct Case {
  v1::AttendHeader header;
  std::vector<client::TensorInput> inputs;
  Tensors data;
  AttentionProblem problem;
  RowLayout q_layout, kv_layout, lse_layout;

  void Add(const v1::TensorSpec& spec, std::vector<std::byte> bytes) {
    data[spec.tensor()] = std::move(bytes);
    inputs.push_back({spec, data[spec.tensor()]});
  }
};

struct Direct {
  std::vector<std::byte> o;
  std::vector<float> lse;
  AttentionReport report;
};

Direct RunDirectly(const Case& c) {
  Backend& backend = *SharedModel::Get().backend;
  const auto plan = *backend.Plan(c.problem);
  const AttentionGeometry& g = plan->geometry;
  Buffer workspace = *backend.Allocate(plan->workspace_bytes);
  Direct direct;
  direct.o.resize(c.data.at(v1::Q).size());
  direct.lse.resize(static_cast<size_t>(g.total_q * g.num_heads));
  AttentionTensors tensors;
  tensors.q = {c.data.at(v1::Q).data(), c.q_layout};
  tensors.k = {c.data.at(v1::K).data(), c.kv_layout};
  tensors.v = {c.data.at(v1::V).data(), c.kv_layout};
  tensors.o = {direct.o.data(), c.q_layout};
  tensors.lse = {direct.lse.data(), c.lse_layout};
  EXPECT_TRUE(backend.Run(*plan, tensors, workspace.workspace(), {}).ok());
  EXPECT_TRUE(
      backend.ReadReport(*plan, workspace.workspace(), {true, true}, &direct.report)
          .ok());
  return direct;
}

// [batch 2, heads 4 over 2, 500 queries at the end of 600 keys, width 64].
Case DenseBatch(DType dtype, v1::DType wire) {
  Case c;
  c.Add(SpecOf(v1::Q, wire, {2, 4, 500, 64}), RandomTensor(2 * 4 * 500 * 64, dtype, 1));
  c.Add(SpecOf(v1::K, wire, {2, 2, 600, 64}), RandomTensor(2 * 2 * 600 * 64, dtype, 2));
  c.Add(SpecOf(v1::V, wire, {2, 2, 600, 64}), RandomTensor(2 * 2 * 600 * 64, dtype, 3));
  c.problem.shape = {4, 2, 64, {{500, 600}, {500, 600}}};
  c.problem.dtype = dtype;
  c.q_layout = DenseBatchLayout(4, 500, 64);
  c.kv_layout = DenseBatchLayout(2, 600, 64);
  c.lse_layout = DenseBatchLayout(4, 500, 1);
  return c;
}

void WantEverything(v1::AttendHeader& header) {
  for (auto tensor : {v1::O, v1::LSE, v1::ORDER, v1::LIST_OFFSETS, v1::LIST_INDICES}) {
    header.add_want(tensor);
  }
}

struct MethodCase {
  std::string name;
  AttentionOptions options;
  DType dtype;
  v1::DType wire_dtype;
};

// Every row of the attention matrix, the dtypes in turn.
std::vector<MethodCase> ServedMethods() {
  const std::pair<DType, v1::DType> dtypes[] = {
      {DType::kF32, v1::F32}, {DType::kBF16, v1::BF16}, {DType::kF16, v1::F16}};
  std::vector<MethodCase> cases;
  for (auto& [name, options] : testing_support::MatrixMethods()) {
    const auto& [dtype, wire] = dtypes[cases.size() % std::size(dtypes)];
    options.coverage_rows = std::max(options.coverage_rows, 16);
    cases.push_back({name + "_" + DTypeName(dtype), options, dtype, wire});
  }
  return cases;
}

AttentionOptions PbsOfSmallBlocks() {
  AttentionOptions options;
  options.block_size = 32;
  options.segment_size = 64;
  options.threshold = 0.6f;
  return options;
}

class AttendMethodSpec : public testing::TestWithParam<MethodCase> {};

TEST_P(AttendMethodSpec, TheReplyIsTheBackendsBitForBit) {
  const MethodCase& p = GetParam();
  Case c = DenseBatch(p.dtype, p.wire_dtype);
  *c.header.mutable_options() = EncodeAttentionOptions(p.options);
  c.problem.options = p.options;
  WantEverything(c.header);
  TestNode node;
  Reply reply;
  // Chunks that cut elements: the offset is in bytes.
  const auto stats =
      node.NewClient()->Attend(c.header, c.inputs, reply, /*chunk_bytes=*/70'001);
  ASSERT_TRUE(stats.ok()) << stats.status();
  const Direct direct = RunDirectly(c);
  EXPECT_EQ(reply.tensors.at(v1::O), direct.o);
  EXPECT_EQ(reply.As<float>(v1::LSE), direct.lse);
  EXPECT_EQ(reply.As<uint16_t>(v1::LIST_INDICES), direct.report.lists.indices);
  std::vector<int64_t> offsets = direct.report.lists.begin;
  offsets.push_back(static_cast<int64_t>(direct.report.lists.indices.size()));
  EXPECT_EQ(reply.As<int64_t>(v1::LIST_OFFSETS), offsets);
  EXPECT_EQ(stats->density(), direct.report.stats.Density());
  EXPECT_EQ(stats->lower_density(), direct.report.stats.LowerDensity());
  EXPECT_EQ(stats->coverage_rows(), direct.report.stats.coverage_rows);
  EXPECT_EQ(stats->coverage(), direct.report.stats.coverage);
  const std::vector<int32_t> guarded(stats->guarded_heads().begin(),
                                     stats->guarded_heads().end());
  EXPECT_EQ(guarded, direct.report.heads.guarded);
  EXPECT_EQ(stats->head_density_size(), 4);
  EXPECT_EQ(stats->iterations_size(), 1);
  EXPECT_EQ(reply.shapes.at(v1::O), (std::vector<int64_t>{2, 4, 500, 64}));
  EXPECT_EQ(reply.shapes.at(v1::LSE), (std::vector<int64_t>{2, 4, 500}));
  // [batch, heads, keys] on the wire, [heads, keys of all sequences] in the report.
  const int64_t order_heads = reply.shapes.at(v1::ORDER)[1];
  const auto order = reply.As<int32_t>(v1::ORDER);
  for (int64_t n = 0; n < 2; ++n) {
    for (int64_t head = 0; head < order_heads; ++head) {
      for (int64_t slot = 0; slot < 600; ++slot) {
        ASSERT_EQ(order[(n * order_heads + head) * 600 + slot],
                  direct.report.order[head * 1200 + n * 600 + slot]);
      }
    }
  }
  EXPECT_TRUE(node.NothingHeld());
}

INSTANTIATE_TEST_SUITE_P(Matrix, AttendMethodSpec, testing::ValuesIn(ServedMethods()),
                         testing_support::CaseName());

TEST(AttendSpec, PackedSequencesOfDifferentLengths) {
  Case c;
  c.Add(SpecOf(v1::Q, v1::F32, {2, 300, 32}),
        RandomTensor(2 * 300 * 32, DType::kF32, 1));
  c.Add(SpecOf(v1::K, v1::F32, {1, 471, 32}), RandomTensor(471 * 32, DType::kF32, 2));
  c.Add(SpecOf(v1::V, v1::F32, {1, 471, 32}), RandomTensor(471 * 32, DType::kF32, 3));
  for (int32_t end : {0, 1, 1, 300}) c.header.add_cu_seqlens(end);
  for (int32_t end : {0, 1, 1, 471}) c.header.add_cu_seqlens_k(end);
  *c.header.mutable_options() = EncodeAttentionOptions(PbsOfSmallBlocks());
  c.problem.shape = {2, 1, 32, {{1, 1}, {0, 0}, {299, 470}}};
  c.problem.options = PbsOfSmallBlocks();
  c.q_layout = PackedLayout(300, 32);
  c.kv_layout = PackedLayout(471, 32);
  c.lse_layout = PackedLayout(300, 1);
  WantEverything(c.header);
  TestNode node;
  Reply reply;
  const auto stats = node.NewClient()->Attend(c.header, c.inputs, reply);
  ASSERT_TRUE(stats.ok()) << stats.status();
  const Direct direct = RunDirectly(c);
  EXPECT_EQ(reply.tensors.at(v1::O), direct.o);
  EXPECT_EQ(reply.As<float>(v1::LSE), direct.lse);
  EXPECT_EQ(reply.As<int32_t>(v1::ORDER), direct.report.order);
  EXPECT_EQ(reply.shapes.at(v1::ORDER), (std::vector<int64_t>{1, 471}));
}

TEST(AttendSpec, OrderAndListsOfOneCallServeTheNext) {
  TestNode node;
  auto client = node.NewClient();
  Case c = DenseBatch(DType::kF32, v1::F32);
  *c.header.mutable_options() = EncodeAttentionOptions(PbsOfSmallBlocks());
  WantEverything(c.header);
  Reply first, second;
  ASSERT_TRUE(client->Attend(c.header, c.inputs, first).ok());

  c.header.mutable_options()->mutable_pbs()->set_use_given_order(true);
  c.header.mutable_options()->mutable_pbs()->set_use_given_lists(true);
  c.Add(SpecOf(v1::ORDER, v1::I32, {2, 2, 600}), first.tensors.at(v1::ORDER));
  for (auto tensor : {v1::LIST_OFFSETS, v1::LIST_INDICES}) {
    c.Add(SpecOf(tensor, tensor == v1::LIST_OFFSETS ? v1::I64 : v1::U16,
                 {first.shapes.at(tensor)[0]}),
          first.tensors.at(tensor));
  }
  const auto stats = client->Attend(c.header, c.inputs, second);
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(second.tensors, first.tensors);
}

TEST(AttendSpec, SendsOnlyWhatIsWanted) {
  TestNode node;
  Case c = DenseBatch(DType::kF32, v1::F32);
  c.header.add_want(v1::LSE);
  Reply reply;
  ASSERT_TRUE(node.NewClient()->Attend(c.header, c.inputs, reply).ok());
  EXPECT_EQ(reply.tensors.size(), 1u);
  EXPECT_EQ(reply.tensors.count(v1::LSE), 1u);
}

TEST(AttendSpec, NonFiniteValuesPassWhenAllowed) {
  TestNode node;
  Case c = DenseBatch(DType::kF32, v1::F32);
  c.header.mutable_options()->mutable_dense();
  const float infinity = std::numeric_limits<float>::infinity();
  std::memcpy(c.data[v1::V].data(), &infinity, sizeof(infinity));
  Reply reply;
  EXPECT_EQ(node.NewClient()->Attend(c.header, c.inputs, reply).status(),
            absl::InvalidArgumentError("tensor V element 0 is NaN or infinite"));
  c.header.set_allow_non_finite(true);
  EXPECT_TRUE(node.NewClient()->Attend(c.header, c.inputs, reply).ok());
}

v1::AttendHeader Synthetic(uint64_t seed, bool white_noise) {
  v1::AttendHeader header;
  v1::SyntheticSpec& spec = *header.mutable_synthetic();
  spec.set_batch(2);
  spec.set_num_heads(4);
  spec.set_num_kv_heads(2);
  spec.set_seq_len(2048);
  spec.set_head_dim(64);
  spec.set_dtype(v1::BF16);
  spec.set_seed(seed);
  spec.set_white_noise(white_noise);
  return header;
}

TEST(AttendSpec, TheServersGeneratorIsStructuredUnlessAskedForNoise) {
  TestNode node;
  auto client = node.NewClient();
  v1::AttendHeader header = Synthetic(7, false);
  header.set_warmup(1);
  header.set_repetitions(3);
  Reply structured, again, noise;
  const auto stats = client->Attend(header, {}, structured);
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(stats->iterations_size(), 3);
  EXPECT_GT(stats->iterations(0).attend_seconds(), 0);
  const auto noisy = client->Attend(Synthetic(7, true), {}, noise);
  ASSERT_TRUE(noisy.ok());
  EXPECT_LT(stats->density(), 0.9 * noisy->density());
  ASSERT_TRUE(client->Attend(Synthetic(7, false), {}, again).ok());
  EXPECT_EQ(again.tensors, structured.tensors);
  EXPECT_TRUE(node.NothingHeld());
}

// 2 MB of O through a window of 64 KiB: when the first chunk is here, the last has not
// been sent.
TEST(AttendSpec, TheStatsSayHowLongSendingTook) {
  TestNode node;
  grpc::ClientContext context;
  auto stream = v1::Attention::NewStub(node.NewNarrowChannel())->Attend(&context);
  v1::AttendRequest request;
  *request.mutable_header() = Synthetic(1, true);
  ASSERT_TRUE(stream->Write(request));
  ASSERT_TRUE(stream->WritesDone());
  v1::AttendResponse response;
  while (stream->Read(&response) && !response.has_chunk()) {
  }
  ASSERT_TRUE(response.has_chunk());
  node.Advance(absl::Seconds(3));
  v1::AttendStats stats;
  while (stream->Read(&response)) {
    if (response.has_stats()) stats = response.stats();
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(stats.stages().send(), 3);
  const auto sends = node.metrics.engine.StageTime(Stage::kSend).Collect().histogram;
  EXPECT_EQ(sends.sample_count, 1u);
  EXPECT_EQ(sends.sample_sum, 3);
}

TEST(AttendSpec, UploadsBeyondTheLimitAreToldToComeBack) {
  NodeOptions options;
  options.service.limits.upload_requests_max = 1;
  TestNode node(options);
  client::RawStream holder(node.NewChannel(), "/pbs.v1.Attention/Attend", {});
  v1::AttendRequest request;
  *request.mutable_header() = Synthetic(1, true);
  ASSERT_TRUE(holder.Write(wire::EncodeMessage(request)));
  ASSERT_TRUE(Eventually([&] { return node.ledger.bytes_held() > 0; }));
  Reply reply;
  EXPECT_EQ(
      node.NewClient()->Attend(Synthetic(1, true), {}, reply).status(),
      absl::ResourceExhaustedError("uploads under way reach upload_requests_max 1"));
  holder.WritesDone();
  grpc::ByteBuffer message;
  while (holder.Read(&message)) {
  }
  EXPECT_TRUE(holder.Finish().ok());
  EXPECT_TRUE(node.NewClient()->Attend(Synthetic(1, true), {}, reply).ok());
  EXPECT_EQ(node.metrics.engine.Rejected(RejectReason::kUploads).Value(), 1);
}

}  // namespace
}  // namespace pbs::server
