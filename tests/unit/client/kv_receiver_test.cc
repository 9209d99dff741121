// Spec: client/cpp/kv_receiver.h.
#include "client/cpp/kv_receiver.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/case_name.h"

namespace pbs::client {
namespace {

struct Target final : KvTarget {
  std::span<std::byte> Array(int32_t layer, v1::KvChunk::Kind kind,
                             int64_t bytes) override {
    auto& array = arrays[{layer, kind}];
    array.resize(refuse ? 0 : static_cast<size_t>(bytes));
    return array;
  }
  void OnLayer(int32_t layer) override { layers.push_back(layer); }

  bool refuse = false;
  std::map<std::pair<int32_t, int>, std::vector<std::byte>> arrays;
  std::vector<int32_t> layers;
};

// Layers 1 and 2 of tokens 4..7 of heads 1 and 2, width 2, f16: 16-byte rows of heads.
KvExpectation Expected() {
  KvExpectation e;
  e.epoch = 9;
  e.layer_begin = 1;
  e.layer_count = 2;
  e.token_begin = 4;
  e.token_count = 4;
  e.head_begin = 1;
  e.head_count = 2;
  e.head_dim = 2;
  e.dtype = v1::F16;
  return e;
}

wire::KvChunk Chunk(int32_t layer, v1::KvChunk::Kind kind, int32_t head,
                    const std::string& payload) {
  wire::KvChunk chunk;
  chunk.ticket_epoch = 9;
  chunk.layer = layer;
  chunk.kind = kind;
  chunk.token_begin = 4;
  chunk.token_count = 4;
  chunk.head_begin = head;
  chunk.head_count = 1;
  chunk.dtype = v1::F16;
  chunk.layout = v1::HND;
  chunk.byte_offset = static_cast<uint64_t>(head - 1) * 16;
  chunk.payload = wire::Payload(grpc::Slice(payload));
  chunk.crc32c = wire::Crc32c(std::as_bytes(std::span(payload)));
  return chunk;
}

// One chunk per head; the digest on the last of each layer.
std::vector<wire::KvChunk> GoodChunks() {
  std::vector<wire::KvChunk> chunks;
  for (int32_t layer : {1, 2}) {
    wire::LayerDigest digest;
    for (auto kind : {v1::KvChunk::K, v1::KvChunk::V}) {
      for (int32_t head : {1, 2}) {
        chunks.push_back(
            Chunk(layer, kind, head,
                  std::string(16, static_cast<char>('a' + chunks.size()))));
        digest.Add(*chunks.back().crc32c);
      }
    }
    chunks.back().layer_digest = digest.value();
  }
  return chunks;
}

TEST(KvReceiverSpec, PutsChunksIntoTheCallersArraysAndSaysWhenLayersAreDone) {
  Target target;
  KvReceiver receiver(Expected(), target);
  for (const wire::KvChunk& chunk : GoodChunks()) {
    ASSERT_FALSE(receiver.complete());
    const absl::Status status = receiver.Add(chunk);
    ASSERT_TRUE(status.ok()) << status;
  }
  EXPECT_TRUE(receiver.complete());
  EXPECT_EQ(receiver.bytes(), 8 * 16);
  EXPECT_EQ(target.layers, (std::vector<int32_t>{1, 2}));
  const auto& array = target.arrays.at({2, v1::KvChunk::V});
  EXPECT_EQ(array.size(), 32u);
  EXPECT_EQ(array[0], static_cast<std::byte>('g'));
  EXPECT_EQ(array[31], static_cast<std::byte>('h'));
}

struct RefusedCase {
  const char* name;
  size_t after;                                // good chunks before
  std::function<void(wire::KvChunk&)> change;  // of the next one
  const char* message;
};

class RefusedKvSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedKvSpec, IsDataLoss) {
  Target target;
  KvReceiver receiver(Expected(), target);
  std::vector<wire::KvChunk> chunks = GoodChunks();
  chunks.push_back(chunks.back());
  for (size_t i = 0; i < GetParam().after; ++i) {
    ASSERT_TRUE(receiver.Add(chunks[i]).ok());
  }
  wire::KvChunk& chunk = chunks[GetParam().after];
  GetParam().change(chunk);
  const absl::Status status = receiver.Add(chunk);
  EXPECT_EQ(std::string(status.message()), GetParam().message);
  EXPECT_TRUE(absl::IsDataLoss(status));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedKvSpec,
    testing::Values(
        RefusedCase{"corrupt_payload", 2,
                    [](auto& c) {
                      c.payload = wire::Payload(grpc::Slice(std::string(16, 'X')));
                    },
                    "chunk of layer 1 V offset 0 is corrupt: crc32c fd20dddb, sent was "
                    "493dac63"},
        RefusedCase{"no_checksum", 0, [](auto& c) { c.crc32c.reset(); },
                    "chunk of layer 1 K offset 0 has no crc32c"},
        RefusedCase{"digest", 3, [](auto& c) { *c.layer_digest ^= 1; },
                    "layer 1 is corrupt: digest 01742792, sent was 01742793"},
        RefusedCase{"no_digest", 3, [](auto& c) { c.layer_digest.reset(); },
                    "layer 1 is corrupt: digest 01742792, sent was none"},
        RefusedCase{"missing_chunk", 1,
                    [](auto& c) {
                      c.kind = v1::KvChunk::V;
                      c.byte_offset = 0;
                      c.head_begin = 1;
                    },
                    "chunk of layer 1 V offset 0 is missing its predecessors or was "
                    "sent twice; expected layer 1 K offset 16"},
        RefusedCase{"doubled_chunk", 1,
                    [](auto& c) {
                      c.byte_offset = 0;
                      c.head_begin = 1;
                    },
                    "chunk of layer 1 K offset 0 is missing its predecessors or was "
                    "sent twice; expected layer 1 K offset 16"},
        RefusedCase{"another_layer", 4, [](auto& c) { c.layer = 1; },
                    "chunk of layer 1 K offset 0 is missing its predecessors or was "
                    "sent twice; expected layer 2 K offset 0"},
        RefusedCase{"another_epoch", 0, [](auto& c) { c.ticket_epoch = 10; },
                    "chunk of layer 1 K offset 0 has epoch 10, the ticket has 9"},
        RefusedCase{
            "another_dtype", 0, [](auto& c) { c.dtype = v1::BF16; },
            "chunk of layer 1 K offset 0 has dtype 3 and layout 2, requested were 2 "
            "and 2"},
        RefusedCase{
            "another_layout", 0, [](auto& c) { c.layout = v1::NHD; },
            "chunk of layer 1 K offset 0 has dtype 2 and layout 1, requested were 2 "
            "and 2"},
        RefusedCase{
            "too_long", 0,
            [](auto& c) {
              c.payload = wire::Payload(grpc::Slice(std::string(48, 'a')));
              c.head_count = 3;
            },
            "chunk of layer 1 K offset 0 with 48 bytes says tokens 4+4 of heads "
            "1+3, which does not fit there"},
        RefusedCase{
            "another_rectangle", 0, [](auto& c) { c.token_begin = 5; },
            "chunk of layer 1 K offset 0 with 16 bytes says tokens 5+4 of heads "
            "1+1, which does not fit there"},
        RefusedCase{
            "overflowing_rectangle", 0,
            [](auto& c) {
              c.token_count = INT32_MAX;
              c.head_count = INT32_MAX;
            },
            "chunk of layer 1 K offset 0 with 16 bytes says tokens 4+2147483647 "
            "of heads 1+2147483647, which does not fit there"},
        RefusedCase{"empty", 0,
                    [](auto& c) {
                      c.payload.Clear();
                      c.token_count = 0;
                    },
                    "chunk of layer 1 K offset 0 with 0 bytes says tokens 4+0 of heads "
                    "1+1, which does not fit there"},
        RefusedCase{"past_the_end", 8, [](auto&) {},
                    "chunk of layer 2 V offset 16 after the last one"}),
    testing_support::CaseName());

TEST(KvReceiverSpec, WithoutChecksumsCorruptionGoesUnseen) {
  Target target;
  KvExpectation expected = Expected();
  expected.checksums = false;
  KvReceiver receiver(expected, target);
  wire::KvChunk chunk = GoodChunks()[0];
  chunk.payload = wire::Payload(grpc::Slice(std::string(16, 'X')));
  EXPECT_TRUE(receiver.Add(chunk).ok());
}

TEST(KvReceiverSpec, ResumesAtTheLayerThatWasNotComplete) {
  const std::vector<wire::KvChunk> chunks = GoodChunks();
  Target target;
  KvReceiver receiver(Expected(), target);
  for (size_t i = 0; i < 7; ++i) ASSERT_TRUE(receiver.Add(chunks[i]).ok());
  receiver.Rewind();
  EXPECT_EQ(receiver.layer(), 2);
  EXPECT_EQ(receiver.bytes(), 4 * 16);
  for (size_t i = 4; i < 8; ++i) ASSERT_TRUE(receiver.Add(chunks[i]).ok());
  EXPECT_TRUE(receiver.complete());
  EXPECT_EQ(receiver.bytes(), 8 * 16);
}

TEST(KvReceiverSpec, ATargetMayRefuse) {
  Target target;
  target.refuse = true;
  KvReceiver receiver(Expected(), target);
  EXPECT_EQ(
      receiver.Add(GoodChunks()[0]),
      absl::ResourceExhaustedError("no memory for 32 bytes of layer 1 K offset 0"));
}

}  // namespace
}  // namespace pbs::client
