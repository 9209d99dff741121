// Spec: KvReceiver::Resume() and F8_E4M3 of client/cpp/kv_receiver.h.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "client/cpp/kv_receiver.h"
#include "tests/support/kv_arrays.h"

namespace pbs::client {
namespace {

using testing_support::KvArrays;

constexpr int32_t kLayers = 2, kHeads = 3, kTokens = 6, kDim = 2;

// Tokens 4..9 of heads 1..3 of layers 1 and 2, f16: 4-byte rows.
KvExpectation Expected(v1::KvLayout layout) {
  KvExpectation e;
  e.epoch = 9;
  e.layer_begin = 1;
  e.layer_count = kLayers;
  e.token_begin = 4;
  e.token_count = kTokens;
  e.head_begin = 1;
  e.head_count = kHeads;
  e.head_dim = kDim;
  e.dtype = v1::F16;
  e.layout = layout;
  return e;
}

// A server's answer from a row of a layer on: chunks of one row (NHD: one token), with
// the digests of this stream.
std::vector<wire::KvChunk> ChunksFrom(const KvExpectation& e, int32_t layer,
                                      v1::KvChunk::Kind kind, int64_t row) {
  std::vector<wire::KvChunk> chunks;
  const int64_t step = e.layout == v1::NHD ? e.head_count : 1;
  const int64_t rows = int64_t{e.token_count} * e.head_count;
  for (; layer < e.layer_begin + e.layer_count; ++layer, kind = v1::KvChunk::K) {
    wire::LayerDigest digest;
    for (; kind <= v1::KvChunk::V; kind = static_cast<v1::KvChunk::Kind>(kind + 1)) {
      for (; row < rows; row += step) {
        wire::KvChunk chunk;
        chunk.ticket_epoch = 9;
        chunk.layer = layer;
        chunk.kind = kind;
        chunk.head_count = static_cast<int32_t>(step);
        chunk.token_count = 1;
        const bool nhd = e.layout == v1::NHD;
        chunk.head_begin =
            e.head_begin + (nhd ? 0 : static_cast<int32_t>(row / e.token_count));
        chunk.token_begin =
            e.token_begin +
            static_cast<int32_t>(nhd ? row / e.head_count : row % e.token_count);
        chunk.dtype = e.dtype;
        chunk.layout = e.layout;
        chunk.byte_offset = static_cast<uint64_t>(row * e.row_bytes());
        std::string payload;
        for (int64_t i = 0; i < step * e.row_bytes(); ++i) {
          payload.push_back(static_cast<char>(layer * 91 + kind * 37 + row * 5 + i));
        }
        chunk.payload = wire::Payload(grpc::Slice(payload));
        chunk.crc32c = wire::Crc32cOf(chunk);
        digest.Add(*chunk.crc32c);
        chunks.push_back(std::move(chunk));
      }
      row = 0;
    }
    chunks.back().layer_digest = digest.value();
  }
  return chunks;
}

int64_t RowOf(const KvExpectation& e, const v1::KvPlace& place) {
  const int64_t head = place.head() - e.head_begin;
  const int64_t token = place.token() - e.token_begin;
  return e.layout == v1::NHD ? token * e.head_count + head
                             : head * e.token_count + token;
}

class KvResumeReceiverSpec : public testing::TestWithParam<v1::KvLayout> {};

TEST_P(KvResumeReceiverSpec, GoesOnAfterTheLastGoodChunkWhereverTheStreamBroke) {
  const KvExpectation e = Expected(GetParam());
  const auto all = ChunksFrom(e, 1, v1::KvChunk::K, 0);
  KvArrays whole;
  KvReceiver undisturbed(e, whole);
  for (const auto& chunk : all) ASSERT_TRUE(undisturbed.Add(chunk).ok());
  for (size_t cut = 0; cut < all.size(); ++cut) {
    SCOPED_TRACE(testing::Message() << "after " << cut << " chunks");
    KvArrays arrays;
    KvReceiver receiver(e, arrays);
    for (size_t i = 0; i < cut; ++i) ASSERT_TRUE(receiver.Add(all[i]).ok());
    const int64_t bytes = receiver.bytes();
    receiver.Resume();
    EXPECT_EQ(receiver.bytes(), bytes);
    const auto place = receiver.place();
    const auto rest = ChunksFrom(e, receiver.layer(),
                                 place.has_value() ? place->kind() : v1::KvChunk::K,
                                 place.has_value() ? RowOf(e, *place) : 0);
    EXPECT_EQ(rest.size(), all.size() - cut);  // nothing is sent twice
    for (const auto& chunk : rest) {
      const absl::Status status = receiver.Add(chunk);
      ASSERT_TRUE(status.ok()) << status;
    }
    EXPECT_TRUE(receiver.complete());
    EXPECT_EQ(arrays.arrays, whole.arrays);
    EXPECT_EQ(arrays.layers, whole.layers);
    EXPECT_EQ(receiver.bytes(), undisturbed.bytes());
  }
}

TEST_P(KvResumeReceiverSpec, AServerThatDoesNotKnowResumeBeginsTheLayerAgain) {
  const KvExpectation e = Expected(GetParam());
  const auto all = ChunksFrom(e, 1, v1::KvChunk::K, 0);
  for (size_t cut = 0; cut < all.size(); ++cut) {
    SCOPED_TRACE(testing::Message() << "after " << cut << " chunks");
    KvArrays arrays, whole;
    KvReceiver undisturbed(e, whole), receiver(e, arrays);
    for (const auto& chunk : all) ASSERT_TRUE(undisturbed.Add(chunk).ok());
    for (size_t i = 0; i < cut; ++i) ASSERT_TRUE(receiver.Add(all[i]).ok());
    receiver.Resume();
    for (const auto& chunk : ChunksFrom(e, receiver.layer(), v1::KvChunk::K, 0)) {
      ASSERT_TRUE(receiver.Add(chunk).ok());
    }
    EXPECT_TRUE(receiver.complete());
    EXPECT_EQ(arrays.arrays, whole.arrays);
    EXPECT_EQ(receiver.bytes(), undisturbed.bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, KvResumeReceiverSpec,
                         testing::Values(v1::HND, v1::NHD), [](const auto& param) {
                           return v1::KvLayout_Name(param.param);
                         });

TEST(KvResumeReceiverFaultSpec, OnlyTheFirstChunkMayBeginTheLayerAgain) {
  const KvExpectation e = Expected(v1::HND);
  const auto all = ChunksFrom(e, 1, v1::KvChunk::K, 0);
  KvArrays arrays;
  KvReceiver receiver(e, arrays);
  for (size_t i = 0; i < 3; ++i) ASSERT_TRUE(receiver.Add(all[i]).ok());
  receiver.Resume();
  ASSERT_TRUE(receiver.Add(all[3]).ok());
  EXPECT_TRUE(absl::IsDataLoss(receiver.Add(all[0])));
  receiver.Resume();
  EXPECT_TRUE(absl::IsDataLoss(receiver.Add(all[2])));  // neither place
}

// ---- F8_E4M3

KvExpectation ExpectedFp8() {
  KvExpectation e = Expected(v1::HND);
  e.layer_count = 1;
  e.dtype = v1::F8_E4M3;
  e.stored = v1::F32;
  e.page_tokens = 4;  // pages of tokens 4..7 and 8..9
  return e;
}

wire::KvChunk Fp8Chunk(v1::KvChunk::Kind kind) {
  wire::KvChunk chunk;
  chunk.ticket_epoch = 9;
  chunk.layer = 1;
  chunk.kind = kind;
  chunk.token_begin = 4;
  chunk.token_count = kTokens;
  chunk.head_begin = 1;
  chunk.head_count = kHeads;
  chunk.dtype = v1::F8_E4M3;
  chunk.layout = v1::HND;
  const std::vector<float> scales = {1, 2, 3, 4, 5, 6};
  chunk.scales = wire::Payload(grpc::Slice(scales.data(), scales.size() * 4));
  chunk.payload =
      wire::Payload(grpc::Slice(std::string(kHeads * kTokens * kDim, 0x38)));
  chunk.crc32c = wire::Crc32cOf(chunk);
  return chunk;
}

std::vector<wire::KvChunk> Fp8Layer() {
  std::vector<wire::KvChunk> chunks = {Fp8Chunk(v1::KvChunk::K),
                                       Fp8Chunk(v1::KvChunk::V)};
  wire::LayerDigest digest;
  for (const auto& chunk : chunks) digest.Add(*chunk.crc32c);
  chunks.back().layer_digest = digest.value();
  return chunks;
}

TEST(KvFp8ReceiverSpec, StoresTheNumbersInTheStoredDtype) {
  KvArrays arrays;
  KvReceiver receiver(ExpectedFp8(), arrays);
  for (const auto& chunk : Fp8Layer()) {
    const absl::Status status = receiver.Add(chunk);
    ASSERT_TRUE(status.ok()) << status;
  }
  EXPECT_TRUE(receiver.complete());
  EXPECT_EQ(receiver.bytes(), 2 * kHeads * kTokens * kDim);  // as sent
  const auto& bytes = arrays.arrays.at({1, v1::KvChunk::V});
  std::vector<float> values(kHeads * kTokens * kDim);
  ASSERT_EQ(bytes.size(), values.size() * sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  for (int head = 0; head < kHeads; ++head) {
    for (int token = 0; token < kTokens; ++token) {
      const float scale = static_cast<float>(2 * head + (token < 4 ? 1 : 2));
      EXPECT_EQ(values[static_cast<size_t>((head * kTokens + token) * kDim)], scale);
    }
  }
}

TEST(KvFp8ReceiverSpec, AChangedScaleIsCorrupt) {
  KvArrays arrays;
  KvReceiver receiver(ExpectedFp8(), arrays);
  wire::KvChunk chunk = Fp8Chunk(v1::KvChunk::K);
  const std::vector<float> scales = {1, 2, 3, 4, 5, 7};
  chunk.scales = wire::Payload(grpc::Slice(scales.data(), scales.size() * 4));
  const absl::Status status = receiver.Add(chunk);
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
}

TEST(KvFp8ReceiverSpec, ScalesMustBeThoseOfTheChunksPages) {
  KvArrays arrays;
  KvReceiver receiver(ExpectedFp8(), arrays);
  wire::KvChunk chunk = Fp8Chunk(v1::KvChunk::K);
  chunk.scales = wire::Payload(grpc::Slice(std::string(20, '\0')));
  EXPECT_EQ(receiver.Add(chunk),
            absl::DataLossError(
                "chunk of layer 1 K offset 0 has 20 bytes of scales, not 24"));
}

TEST(KvFp8ReceiverSpec, OtherDtypesHaveNoScales) {
  KvArrays arrays;
  const KvExpectation e = Expected(v1::HND);
  KvReceiver receiver(e, arrays);
  wire::KvChunk chunk = ChunksFrom(e, 1, v1::KvChunk::K, 0)[0];
  chunk.scales = wire::Payload(grpc::Slice(std::string(4, '\0')));
  EXPECT_EQ(receiver.Add(chunk),
            absl::DataLossError(
                "chunk of layer 1 K offset 0 has scales, which only F8_E4M3 has"));
}

}  // namespace
}  // namespace pbs::client
