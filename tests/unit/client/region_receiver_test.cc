// Spec: client/cpp/kv_receiver.h with a KvRegion: bytes come from shared memory that
// may be taken away at any moment.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "client/cpp/kv_receiver.h"
#include "tests/support/case_name.h"

namespace pbs::client {
namespace {

constexpr int32_t kLayers = 2, kHeads = 3, kTokens = 40, kHeadDim = 8;
constexpr size_t kHeadBytes = size_t{kTokens} * kHeadDim * 2;
constexpr size_t kPlaneBytes = kHeads * kHeadBytes;

class RegionReceiverSpec : public testing::Test, public KvTarget {
 protected:
  RegionReceiverSpec() : memory_(2 * kLayers * kPlaneBytes) {
    for (size_t i = 0; i < memory_.size(); ++i) {
      memory_[i] = static_cast<std::byte>(i * 37 + i / 251 + 1);
    }
  }

  std::span<std::byte> Array(int32_t layer, v1::KvChunk::Kind kind,
                             int64_t bytes) override {
    auto& array = arrays_[{layer, kind}];
    array.resize(static_cast<size_t>(bytes));
    return array;
  }
  bool TakesViews() const override { return takes_views_; }
  void OnView(const KvView& view) override { views_.push_back(view); }
  void OnLayer(int32_t layer) override { layers_.push_back(layer); }

  static KvExpectation Expected(bool checksums) {
    KvExpectation e;
    e.epoch = 9;
    e.layer_count = kLayers;
    e.token_count = kTokens;
    e.head_count = kHeads;
    e.head_dim = kHeadDim;
    e.dtype = v1::BF16;
    e.checksums = checksums;
    return e;
  }
  // One chunk per head.
  std::vector<wire::KvChunk> Chunks() const {
    std::vector<wire::KvChunk> chunks;
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      wire::LayerDigest digest;
      for (auto kind : {v1::KvChunk::K, v1::KvChunk::V}) {
        for (int32_t head = 0; head < kHeads; ++head) {
          wire::KvChunk chunk;
          chunk.ticket_epoch = 9;
          chunk.layer = layer;
          chunk.kind = kind;
          chunk.token_count = kTokens;
          chunk.head_begin = head;
          chunk.head_count = 1;
          chunk.dtype = v1::BF16;
          chunk.layout = v1::HND;
          chunk.byte_offset = static_cast<size_t>(head) * kHeadBytes;
          const size_t plane =
              2 * static_cast<size_t>(layer) + (kind == v1::KvChunk::V);
          chunk.region_offset = plane * kPlaneBytes + chunk.byte_offset;
          chunk.crc32c =
              wire::Crc32c(std::span(memory_).subspan(chunk.region_offset, kHeadBytes));
          digest.Add(*chunk.crc32c);
          chunks.push_back(std::move(chunk));
        }
      }
      chunks.back().layer_digest = digest.value();
    }
    return chunks;
  }

  std::vector<std::byte> memory_;
  absl::Status held_ = absl::OkStatus();
  int asked_ = 0;
  const KvRegion region_{memory_, nullptr, [this] {
                           ++asked_;
                           return held_;
                         }};
  std::map<std::pair<int32_t, int>, std::vector<std::byte>> arrays_;
  std::vector<int32_t> layers_;
  bool takes_views_ = false;
  std::vector<KvView> views_;
};

TEST_F(RegionReceiverSpec, PutsPlacesIntoTheCallersArrays) {
  for (bool checksums : {true, false}) {
    arrays_.clear();
    layers_.clear();
    asked_ = 0;
    KvReceiver receiver(Expected(checksums), *this, &region_);
    for (const wire::KvChunk& chunk : Chunks()) {
      const absl::Status status = receiver.Add(chunk);
      ASSERT_TRUE(status.ok()) << status;
    }
    EXPECT_TRUE(receiver.complete());
    EXPECT_EQ(receiver.bytes(), static_cast<int64_t>(memory_.size()));
    EXPECT_EQ(layers_, (std::vector<int32_t>{0, 1}));
    EXPECT_EQ(asked_, checksums ? 0 : kLayers);
    const auto& last = arrays_.at({1, v1::KvChunk::V});
    EXPECT_TRUE(std::equal(last.begin(), last.end(), memory_.end() - kPlaneBytes));
  }
}

TEST_F(RegionReceiverSpec, MemoryThatWasTakenAwayFailsItsChecksum) {
  KvReceiver receiver(Expected(true), *this, &region_);
  const std::vector<wire::KvChunk> chunks = Chunks();
  ASSERT_TRUE(receiver.Add(chunks[0]).ok());
  std::fill(memory_.begin(), memory_.end(), std::byte{0});
  const absl::Status status = receiver.Add(chunks[1]);
  EXPECT_TRUE(absl::IsDataLoss(status)) << status;
  EXPECT_TRUE(layers_.empty());
}

TEST_F(RegionReceiverSpec, WithoutChecksumsTheLeaseIsAskedForBeforeALayerIsDone) {
  KvReceiver receiver(Expected(false), *this, &region_);
  const std::vector<wire::KvChunk> chunks = Chunks();
  held_ = absl::NotFoundError("gone");
  for (size_t i = 0; i < 5; ++i) ASSERT_TRUE(receiver.Add(chunks[i]).ok());
  EXPECT_EQ(receiver.Add(chunks[5]), held_);
  EXPECT_TRUE(layers_.empty());
}

TEST_F(RegionReceiverSpec, GivesViewsToATargetThatTakesThem) {
  takes_views_ = true;
  KvReceiver receiver(Expected(true), *this, &region_);
  for (const wire::KvChunk& chunk : Chunks()) ASSERT_TRUE(receiver.Add(chunk).ok());
  EXPECT_TRUE(receiver.complete());
  EXPECT_TRUE(arrays_.empty()) << "nothing is copied";
  ASSERT_EQ(views_.size(), size_t{2 * kLayers * kHeads});
  const std::byte* next = memory_.data();
  for (const KvView& view : views_) {
    EXPECT_EQ(view.bytes.data(), next);
    EXPECT_EQ(view.bytes.size(), kHeadBytes);
    EXPECT_EQ(view.offset, (next - memory_.data()) % static_cast<int64_t>(kPlaneBytes));
    next += kHeadBytes;
  }
  EXPECT_EQ(views_.back().layer, 1);
  EXPECT_EQ(views_.back().kind, v1::KvChunk::V);
  EXPECT_EQ(layers_, (std::vector<int32_t>{0, 1}));
}

TEST_F(RegionReceiverSpec, GivesNoViewOfMemoryThatWasTakenAway) {
  takes_views_ = true;
  KvReceiver receiver(Expected(true), *this, &region_);
  const std::vector<wire::KvChunk> chunks = Chunks();
  std::fill(memory_.begin(), memory_.end(), std::byte{0});
  EXPECT_TRUE(absl::IsDataLoss(receiver.Add(chunks[0])));
  EXPECT_TRUE(views_.empty());
}

TEST_F(RegionReceiverSpec, WithoutSharedMemoryATargetOfViewsGetsArrays) {
  takes_views_ = true;
  KvReceiver receiver(Expected(true), *this);
  for (wire::KvChunk chunk : Chunks()) {
    const auto bytes = std::span(memory_).subspan(chunk.region_offset, kHeadBytes);
    chunk.payload = wire::Payload(grpc::Slice(bytes.data(), bytes.size()));
    ASSERT_TRUE(receiver.Add(chunk).ok());
  }
  EXPECT_TRUE(views_.empty());
  const auto& last = arrays_.at({1, v1::KvChunk::V});
  EXPECT_TRUE(std::equal(last.begin(), last.end(), memory_.end() - kPlaneBytes));
}

struct BadPlaceCase {
  const char* name;
  std::function<void(wire::KvChunk&)> change;  // of the second chunk
  const char* message;                         // a part
};

class BadPlaceSpec : public RegionReceiverSpec,
                     public testing::WithParamInterface<BadPlaceCase> {};

TEST_P(BadPlaceSpec, IsDataLoss) {
  for (int form = 0; form < 4; ++form) {
    const bool checksums = form % 2 == 0;
    takes_views_ = form / 2 == 0;
    KvReceiver receiver(Expected(checksums), *this, &region_);
    std::vector<wire::KvChunk> chunks = Chunks();
    ASSERT_TRUE(receiver.Add(chunks[0]).ok());
    GetParam().change(chunks[1]);
    const absl::Status status = receiver.Add(chunks[1]);
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    EXPECT_NE(status.message().find(GetParam().message), std::string::npos) << status;
  }
}

constexpr uint64_t kRegionBytes = 2 * kLayers * kPlaneBytes;

INSTANTIATE_TEST_SUITE_P(
    Cases, BadPlaceSpec,
    testing::Values(
        BadPlaceCase{"one_byte_past_the_end",
                     [](auto& c) { c.region_offset = kRegionBytes - kHeadBytes + 1; },
                     "is outside the shared memory of 7680 bytes"},
        BadPlaceCase{"behind_the_end",
                     [](auto& c) { c.region_offset = kRegionBytes + 1; },
                     "is outside the shared memory"},
        BadPlaceCase{"sum_overflows", [](auto& c) { c.region_offset = UINT64_MAX - 3; },
                     "is outside the shared memory"},
        BadPlaceCase{"has_a_payload",
                     [](auto& c) {
                       c.payload = wire::Payload(grpc::Slice(std::string(640, 'x')));
                     },
                     "does not fit there"},
        BadPlaceCase{"no_tokens", [](auto& c) { c.token_count = 0; },
                     "does not fit there"},
        BadPlaceCase{"negative", [](auto& c) { c.token_count = -1; },
                     "does not fit there"},
        BadPlaceCase{"too_many_heads", [](auto& c) { c.head_count = INT32_MAX; },
                     "does not fit there"}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::client
