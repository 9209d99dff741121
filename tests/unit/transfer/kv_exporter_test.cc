// Spec: server/transfer/kv_exporter.h, kv.proto "KvChunk".
#include "server/transfer/kv_exporter.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "tests/support/case_name.h"
#include "tests/support/kv_fixture.h"

namespace pbs::server {
namespace {

using testing_support::KvElement;
using testing_support::MakeHeldKv;

constexpr uint64_t kEpoch = 5;
// 2 layers, 3 heads of 64, 700 tokens: 89,600 bytes per head in bf16.
constexpr KvShape kShape = {2, 3, 64, 700, DType::kBF16};

struct ExportCase {
  const char* name;
  KvRange range;
  KvFormat format;
  bool copies;
};

std::vector<wire::KvChunk> ExportAll(const std::shared_ptr<HeldKv>& kv,
                                     const KvRange& range, const KvFormat& format) {
  auto exporter = KvExporter::Create(kv, kEpoch, range, format);
  EXPECT_TRUE(exporter.ok()) << exporter.status();
  std::vector<wire::KvChunk> chunks;
  while (!(*exporter)->done()) chunks.push_back((*exporter)->Next());
  return chunks;
}

class KvExporterSpec : public testing::TestWithParam<ExportCase> {
 protected:
  DType dtype() const { return GetParam().format.dtype.value_or(kShape.dtype); }

  // What an array must hold, straight from the definition.
  std::vector<std::byte> Expected(int32_t layer, int kind) const {
    const auto& [name, range, format, copies] = GetParam();
    std::vector<float> values;
    const auto element = [&](int32_t head, int32_t token, int32_t i) {
      const int64_t row = int64_t{head} * kShape.capacity + token;
      return KvElement(2 * layer + kind, row * kShape.head_dim + i);
    };
    const bool nhd = format.layout == KvLayout::kNhd;
    const int32_t outer = nhd ? range.token_count : range.head_count;
    const int32_t inner = nhd ? range.head_count : range.token_count;
    for (int32_t a = 0; a < outer; ++a) {
      for (int32_t b = 0; b < inner; ++b) {
        for (int32_t i = 0; i < kShape.head_dim; ++i) {
          values.push_back(element(range.head_begin + (nhd ? b : a),
                                   range.token_begin + (nhd ? a : b), i));
        }
      }
    }
    std::vector<std::byte> bytes(values.size() *
                                 static_cast<size_t>(DTypeBytes(dtype())));
    ConvertElements(values.data(), DType::kF32, bytes.data(), dtype(),
                    static_cast<int64_t>(values.size()));
    return bytes;
  }
};

TEST_P(KvExporterSpec, ChunksAreTheArraysInOrder) {
  const auto& [name, range, format, copies] = GetParam();
  const auto kv = MakeHeldKv(kShape);
  std::map<std::pair<int32_t, int>, std::vector<std::byte>> arrays;
  std::pair<int32_t, int> last = {range.layer_begin, v1::KvChunk::K};
  for (const wire::KvChunk& chunk : ExportAll(kv, range, format)) {
    const std::pair<int32_t, int> key = {chunk.layer, chunk.kind};
    ASSERT_GE(key, last);
    last = key;
    auto& array = arrays[key];
    ASSERT_EQ(chunk.byte_offset, array.size());
    ASSERT_LE(chunk.payload.size(), static_cast<size_t>(format.chunk_bytes));
    array.resize(array.size() + chunk.payload.size());
    chunk.payload.CopyTo(array.data() + chunk.byte_offset);
  }
  ASSERT_EQ(arrays.size(), 2u * static_cast<size_t>(range.layer_count));
  for (const auto& [key, bytes] : arrays) {
    ASSERT_EQ(bytes, Expected(key.first, key.second == v1::KvChunk::V ? 1 : 0))
        << "layer " << key.first << " kind " << key.second;
  }
}

TEST_P(KvExporterSpec, EveryChunkIsTheRectangleThatItSays) {
  const auto& [name, range, format, copies] = GetParam();
  const int64_t row = kShape.head_dim * DTypeBytes(dtype());
  const auto kv = MakeHeldKv(kShape);
  for (const wire::KvChunk& c : ExportAll(kv, range, format)) {
    ASSERT_EQ(c.ticket_epoch, kEpoch);
    ASSERT_EQ(c.dtype, EncodeDType(dtype()));
    ASSERT_EQ(c.layout, EncodeLayout(format.layout));
    ASSERT_EQ(static_cast<int64_t>(c.payload.size()),
              c.token_count * c.head_count * row);
    const int64_t token = c.token_begin - range.token_begin;
    const int64_t head = c.head_begin - range.head_begin;
    const int64_t first_row = format.layout == KvLayout::kNhd
                                  ? token * range.head_count + head
                                  : head * range.token_count + token;
    ASSERT_EQ(static_cast<int64_t>(c.byte_offset), first_row * row);
    const int32_t end = c.token_begin + c.token_count;
    ASSERT_TRUE(end % format.page_tokens == 0 ||
                end == range.token_begin + range.token_count)
        << "end " << end;
  }
}

TEST_P(KvExporterSpec, ChecksumsAndLayerDigestsHold) {
  const auto& [name, range, format, copies] = GetParam();
  const auto kv = MakeHeldKv(kShape);
  const std::vector<wire::KvChunk> chunks = ExportAll(kv, range, format);
  wire::LayerDigest digest;
  for (size_t i = 0; i < chunks.size(); ++i) {
    const wire::KvChunk& chunk = chunks[i];
    if (!format.checksums) {
      EXPECT_FALSE(chunk.crc32c.has_value() || chunk.layer_digest.has_value());
      continue;
    }
    std::vector<std::byte> bytes(chunk.payload.size());
    chunk.payload.CopyTo(bytes.data());
    ASSERT_EQ(chunk.crc32c, wire::Crc32c(bytes));
    digest.Add(*chunk.crc32c);
    const bool layer_ends =
        i + 1 == chunks.size() || chunks[i + 1].layer != chunk.layer;
    ASSERT_EQ(chunk.layer_digest.has_value(), layer_ends);
    if (layer_ends) {
      ASSERT_EQ(chunk.layer_digest, digest.value());
      digest = {};
    }
  }
}

TEST_P(KvExporterSpec, PointsIntoTheCacheWhereItCan) {
  const auto& [name, range, format, copies] = GetParam();
  const auto kv = MakeHeldKv(kShape);
  const auto* begin = static_cast<const uint8_t*>(kv->cache().k(0));
  const auto* end = begin + kShape.bytes();
  int64_t total = 0;
  for (const wire::KvChunk& chunk : ExportAll(kv, range, format)) {
    const uint8_t* data = chunk.payload.pieces().front().begin();
    ASSERT_EQ(data >= begin && data < end, !copies);
    total += static_cast<int64_t>(chunk.payload.size());
  }
  const auto exporter = *KvExporter::Create(kv, kEpoch, range, format);
  EXPECT_EQ(KvExporter::BufferBytes(kShape, range, format),
            copies ? format.chunk_bytes : 0);
  EXPECT_EQ(exporter->total_bytes(), total);
}

TEST_P(KvExporterSpec, CoversItsShareOfTheHeldBytes) {
  const auto& [name, range, format, copies] = GetParam();
  const auto exporter = *KvExporter::Create(MakeHeldKv(kShape), kEpoch, range, format);
  const int64_t elements = int64_t{range.layer_count} * range.token_count *
                           range.head_count * kShape.head_dim * 2;
  EXPECT_EQ(exporter->held_bytes(), elements * DTypeBytes(kShape.dtype));
}

TEST(KvExporterWholeSpec, TheWholeRangeCoversEveryHeldByte) {
  const auto exporter =
      *KvExporter::Create(MakeHeldKv(kShape), kEpoch, WholeRange(kShape),
                          {.dtype = DType::kF32, .chunk_bytes = 1 << 20});
  EXPECT_EQ(exporter->held_bytes(), kShape.bytes());
}

constexpr KvRange kWhole = {0, 2, 0, 700, 0, 3};
constexpr KvRange kPart = {1, 1, 37, 601, 1, 2};

INSTANTIATE_TEST_SUITE_P(
    Cases, KvExporterSpec,
    testing::Values(
        ExportCase{"whole", kWhole, {.chunk_bytes = 1 << 20}, false},
        ExportCase{"small_chunks", kWhole, {.chunk_bytes = 64 << 10}, false},
        ExportCase{"two_heads_a_chunk", kWhole, {.chunk_bytes = 200'000}, false},
        ExportCase{"without_checksums",
                   kWhole,
                   {.chunk_bytes = 64 << 10, .checksums = false},
                   false},
        ExportCase{"part", kPart, {.chunk_bytes = 64 << 10}, false},
        ExportCase{
            "part_in_one_chunk_per_head", kPart, {.chunk_bytes = 1 << 20}, false},
        ExportCase{"pages", kPart, {.page_tokens = 16, .chunk_bytes = 64 << 10}, false},
        ExportCase{"page_of_more_tokens_than_asked",
                   {0, 1, 5, 20, 0, 1},
                   {.page_tokens = 4096, .chunk_bytes = 64 << 10},
                   false},
        ExportCase{"one_token", {0, 1, 699, 1, 2, 1}, {.chunk_bytes = 64 << 10}, false},
        ExportCase{
            "nhd", kWhole, {.layout = KvLayout::kNhd, .chunk_bytes = 64 << 10}, true},
        ExportCase{
            "nhd_part_pages",
            kPart,
            {.layout = KvLayout::kNhd, .page_tokens = 32, .chunk_bytes = 64 << 10},
            true},
        ExportCase{"nhd_of_one_head",
                   {0, 2, 0, 700, 1, 1},
                   {.layout = KvLayout::kNhd, .chunk_bytes = 64 << 10},
                   false},
        ExportCase{
            "f32", kWhole, {.dtype = DType::kF32, .chunk_bytes = 64 << 10}, true},
        ExportCase{"f16_part",
                   kPart,
                   {.dtype = DType::kF16, .page_tokens = 8, .chunk_bytes = 64 << 10},
                   true},
        ExportCase{
            "f32_nhd",
            kPart,
            {.dtype = DType::kF32, .layout = KvLayout::kNhd, .chunk_bytes = 1 << 20},
            true},
        ExportCase{"the_held_dtype_by_name",
                   kWhole,
                   {.dtype = DType::kBF16, .chunk_bytes = 1 << 20},
                   false}),
    testing_support::CaseName());

TEST(KvExporterPageSpec, APageMustFitAChunk) {
  const auto kv = MakeHeldKv(kShape);
  EXPECT_EQ(KvExporter::Create(kv, kEpoch, kWhole,
                               {.page_tokens = 600, .chunk_bytes = 64 << 10})
                .status(),
            absl::InvalidArgumentError(
                "a page of 600 tokens has 76800 bytes, more than chunk_bytes 65536"));
  EXPECT_EQ(KvExporter::Create(
                kv, kEpoch, kWhole,
                {.layout = KvLayout::kNhd, .page_tokens = 200, .chunk_bytes = 64 << 10})
                .status(),
            absl::InvalidArgumentError(
                "a page of 200 tokens has 76800 bytes, more than chunk_bytes 65536"));
}

TEST(KvExporterLifeSpec, ASliceKeepsTheCacheAlive) {
  auto kv = MakeHeldKv(kShape);
  const std::weak_ptr<HeldKv> watched = kv;
  std::vector<wire::KvChunk> chunks = ExportAll(kv, kWhole, {.chunk_bytes = 1 << 20});
  kv.reset();
  EXPECT_FALSE(watched.expired());
  chunks.clear();
  EXPECT_TRUE(watched.expired());
}

struct RangeCase {
  const char* name;
  std::function<void(v1::FetchRequest&)> change;
  const char* message;  // "" when accepted
};

class KvRangeSpec : public testing::TestWithParam<RangeCase> {};

TEST_P(KvRangeSpec, MustLieInsideTheCache) {
  v1::FetchRequest request;
  GetParam().change(request);
  EXPECT_EQ(std::string(DecodeKvRange(request, kShape).status().message()),
            GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, KvRangeSpec,
    testing::Values(
        RangeCase{"everything", [](auto&) {}, ""},
        RangeCase{"last_layer", [](auto& r) { r.set_layer_begin(1); }, ""},
        RangeCase{"layer_past_the_end", [](auto& r) { r.set_layer_begin(2); },
                  "layer_begin 2 is outside [0, 1]"},
        RangeCase{"negative_layer", [](auto& r) { r.set_layer_begin(-1); },
                  "layer_begin -1 is outside [0, 1]"},
        RangeCase{"no_layers", [](auto& r) { r.set_layer_count(0); },
                  "layer_count 0 is outside [1, 2] from layer_begin 0"},
        RangeCase{"token_count_overflows",
                  [](auto& r) {
                    r.set_token_begin(699);
                    r.set_token_count(INT32_MAX);
                  },
                  "token_count 2147483647 is outside [1, 1] from token_begin 699"},
        RangeCase{"token_begin", [](auto& r) { r.set_token_begin(700); },
                  "token_begin 700 is outside [0, 699]"},
        RangeCase{"head_begin", [](auto& r) { r.set_head_begin(3); },
                  "head_begin 3 is outside [0, 2]"},
        RangeCase{"head_count",
                  [](auto& r) {
                    r.set_head_begin(1);
                    r.set_head_count(3);
                  },
                  "head_count 3 is outside [1, 2] from head_begin 1"}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
