// Spec: server/codec/attend_reply.h.
#include "server/codec/attend_reply.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "proto/wire/messages.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

constexpr int32_t kHeads = 3;
constexpr int32_t kKeys = 5;

// A dense batch of which order and lists are wanted.
AttendSpec SpecOf(int32_t batch) {
  AttendSpec spec;
  spec.problem.shape = {kHeads, kHeads, 32,
                        std::vector<SequenceShape>(batch, {kKeys, kKeys})};
  spec.wanted.order = spec.wanted.lists = true;
  return spec;
}

// An order of distinct values and lists of one block per row.
AttendResult ResultOf(const AttendSpec& spec) {
  const AttentionGeometry g = MakeGeometry(spec.problem);
  const int64_t rows = g.total_query_blocks * g.num_heads;
  AttendResult result;
  result.report.order.resize(static_cast<size_t>(g.num_order_heads * g.total_k));
  std::iota(result.report.order.begin(), result.report.order.end(), 0);
  BlockLists& lists = result.report.lists;
  lists.begin.resize(static_cast<size_t>(rows));
  std::iota(lists.begin.begin(), lists.begin.end(), 0);
  lists.count.assign(static_cast<size_t>(rows), 1);
  lists.indices.assign(static_cast<size_t>(rows), 0);
  return result;
}

struct Sent {
  std::vector<size_t> slices;  // of each chunk, its fields included
  std::map<v1::TensorName, std::string> tensors;
  v1::AttendStats stats;
};

// Every message of the reply; `after` is called behind each.
template <class After>
Sent SendAll(AttendReply& reply, int32_t chunk_bytes, const After& after) {
  Sent sent;
  while (auto message = reply.Next()) {
    std::vector<grpc::Slice> slices;
    EXPECT_TRUE(message->Dump(&slices).ok());
    wire::AttendResponse response;
    EXPECT_TRUE(wire::DecodeAttendResponse(*message, &response).ok());
    if (const auto* chunk = std::get_if<wire::TensorChunk>(&response)) {
      EXPECT_LE(chunk->data.size(), static_cast<size_t>(chunk_bytes));
      std::string& tensor = sent.tensors[chunk->tensor];
      EXPECT_EQ(chunk->offset, tensor.size());
      for (const grpc::Slice& piece : chunk->data.pieces()) {
        tensor.append(reinterpret_cast<const char*>(piece.begin()), piece.size());
      }
      sent.slices.push_back(slices.size());
    }
    if (auto* stats = std::get_if<v1::AttendStats>(&response)) sent.stats = *stats;
    after();
  }
  return sent;
}

template <class T>
std::vector<T> As(const std::string& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

struct BatchCase {
  const char* name;
  int32_t batch;
  int32_t chunk_bytes;
};

class AttendReplySpec : public testing::TestWithParam<BatchCase> {
 protected:
  Sent Send() const {
    const ManualClock clock;
    const AttendSpec spec = SpecOf(GetParam().batch);
    AttendReply reply(spec, {}, GetParam().chunk_bytes, ResultOf(spec), clock);
    return SendAll(reply, GetParam().chunk_bytes, [] {});
  }
};

TEST_P(AttendReplySpec, AnOrderLeavesBySequence) {
  const Sent sent = Send();
  const auto order = As<int32_t>(sent.tensors.at(v1::ORDER));
  const int32_t batch = GetParam().batch;
  ASSERT_EQ(order.size(), static_cast<size_t>(batch * kHeads * kKeys));
  for (int32_t n = 0; n < batch; ++n) {
    for (int32_t head = 0; head < kHeads; ++head) {
      for (int32_t slot = 0; slot < kKeys; ++slot) {
        ASSERT_EQ(order[(n * kHeads + head) * kKeys + slot],
                  (head * batch + n) * kKeys + slot);
      }
    }
  }
}

TEST_P(AttendReplySpec, ListOffsetsEndWithTheNumberOfIndices) {
  const Sent sent = Send();
  std::vector<int64_t> expected(static_cast<size_t>(GetParam().batch * kHeads + 1));
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(As<int64_t>(sent.tensors.at(v1::LIST_OFFSETS)), expected);
}

// What a chunk of many short rows costs beside the result stays bounded.
TEST_P(AttendReplySpec, AChunkHasFewSlices) {
  const Sent sent = Send();
  for (size_t slices : sent.slices) {
    EXPECT_LE(slices, 1 + static_cast<size_t>(AttendReply::kSlicesMax));
  }
}

INSTANTIATE_TEST_SUITE_P(Batches, AttendReplySpec,
                         testing::Values(BatchCase{"one", 1, 1 << 20},
                                         BatchCase{"two_in_tiny_chunks", 2, 7},
                                         BatchCase{"many_in_small_chunks", 700, 1001},
                                         BatchCase{"many_in_one_chunk", 700, 1 << 20}),
                         testing_support::CaseName());

TEST(AttendReplyCopySpec, ChunksPointIntoTheResult) {
  const AttendSpec spec = SpecOf(2);
  const ManualClock clock;
  AttendResult result = ResultOf(spec);
  const auto* begin = reinterpret_cast<const uint8_t*>(result.report.order.data());
  const auto* end = begin + result.report.order.size() * sizeof(int32_t);
  AttendReply reply(spec, {}, 1 << 20, std::move(result), clock);
  ASSERT_TRUE(reply.Next().has_value());  // the header
  const auto message = reply.Next();
  ASSERT_TRUE(message.has_value());
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(message->Dump(&slices).ok());
  ASSERT_EQ(slices.size(), 1u + 2 * kHeads);  // the fields, then a row per slice
  for (size_t i = 1; i < slices.size(); ++i) {
    EXPECT_TRUE(slices[i].begin() >= begin && slices[i].end() <= end) << i;
  }
}

TEST(AttendReplyTimeSpec, SendLastsFromTheHeaderToTheStats) {
  const AttendSpec spec = SpecOf(1);
  ManualClock clock;
  AttendReply reply(spec, {}, 1 << 20, ResultOf(spec), clock);
  clock.Advance(absl::Seconds(10));  // nobody asks yet
  int messages = 0;
  const Sent sent = SendAll(reply, 1 << 20, [&] {
    clock.Advance(absl::Seconds(1));
    ++messages;
  });
  EXPECT_EQ(sent.stats.stages().send(), messages - 1);
  EXPECT_EQ(reply.send_seconds(), messages - 1);
}

}  // namespace
}  // namespace pbs::server
