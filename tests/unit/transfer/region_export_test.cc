// Spec: KvFormat::shared_memory of server/transfer/kv_exporter.h: chunks name places in
// the region of the cache.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "server/transfer/kv_exporter.h"
#include "tests/support/case_name.h"
#include "tests/support/kv_fixture.h"

namespace pbs::server {
namespace {

constexpr uint64_t kEpoch = 5;
// 2 layers, 3 heads of 64, 700 tokens: 89,600 bytes per head in bf16.
constexpr KvShape kShape = {2, 3, 64, 700, DType::kBF16};

struct RegionCase {
  const char* name;
  KvRange range;
  KvFormat format;
};

class RegionExportSpec : public testing::TestWithParam<RegionCase> {};

TEST_P(RegionExportSpec, PlacesHaveTheBytesThatAPlainFetchSends) {
  const auto kv = testing_support::MakeSharedKv(kShape);
  KvFormat shared = GetParam().format;
  shared.shared_memory = true;
  const auto& range = GetParam().range;
  const auto plain = *KvExporter::Create(kv, kEpoch, range, GetParam().format);
  const auto exporter = *KvExporter::Create(kv, kEpoch, range, shared);
  EXPECT_EQ(exporter->total_bytes(), plain->total_bytes());
  while (!exporter->done()) {
    ASSERT_FALSE(plain->done());
    const wire::KvChunk chunk = exporter->Next();
    const wire::KvChunk sent = plain->Next();
    EXPECT_EQ(chunk.payload.size(), 0u);
    const int64_t bytes = exporter->BytesOf(chunk);
    ASSERT_EQ(bytes, static_cast<int64_t>(sent.payload.size()));
    std::vector<std::byte> payload(sent.payload.size());
    sent.payload.CopyTo(payload.data());
    const auto place =
        kv->region()->bytes().subspan(chunk.region_offset, payload.size());
    EXPECT_EQ(std::memcmp(place.data(), payload.data(), payload.size()), 0)
        << "layer " << chunk.layer << " byte " << chunk.byte_offset;
    EXPECT_EQ(chunk.layer, sent.layer);
    EXPECT_EQ(chunk.kind, sent.kind);
    EXPECT_EQ(chunk.token_begin, sent.token_begin);
    EXPECT_EQ(chunk.token_count, sent.token_count);
    EXPECT_EQ(chunk.head_begin, sent.head_begin);
    EXPECT_EQ(chunk.head_count, sent.head_count);
    EXPECT_EQ(chunk.byte_offset, sent.byte_offset);
    EXPECT_EQ(chunk.crc32c, sent.crc32c);
    EXPECT_EQ(chunk.layer_digest, sent.layer_digest);
  }
  EXPECT_TRUE(plain->done());
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RegionExportSpec,
    testing::Values(
        RegionCase{"whole", {0, 2, 0, 700, 0, 3}, {.chunk_bytes = 1 << 20}},
        RegionCase{"small_chunks", {0, 2, 0, 700, 0, 3}, {.chunk_bytes = 64 << 10}},
        RegionCase{"a_part",
                   {1, 1, 33, 500, 1, 2},
                   {.page_tokens = 16, .chunk_bytes = 64 << 10}},
        RegionCase{"no_checksums",
                   {0, 2, 0, 700, 2, 1},
                   {.chunk_bytes = 1 << 20, .checksums = false}}),
    testing_support::CaseName());

TEST(RegionExportLifeSpec, AnExporterKeepsTheRegionAndAChunkDoesNot) {
  auto kv = testing_support::MakeSharedKv(kShape);
  const std::weak_ptr<HeldKv> watched = kv;
  auto exporter = *KvExporter::Create(kv, kEpoch, WholeRange(kShape),
                                      {.chunk_bytes = 1 << 20, .shared_memory = true});
  kv.reset();
  const wire::KvChunk chunk = exporter->Next();
  EXPECT_FALSE(watched.expired());
  exporter.reset();
  EXPECT_TRUE(watched.expired());
}

struct SharedWishCase {
  const char* name;
  std::function<void(v1::FetchRequest&)> change;
  const char* message;  // "" when accepted
};

class SharedWishSpec : public testing::TestWithParam<SharedWishCase> {};

TEST_P(SharedWishSpec, MustBeWhatIsHeld) {
  v1::FetchRequest request;
  request.set_shared_memory(true);
  GetParam().change(request);
  const absl::Status status = CheckSharedMemory(request, DType::kBF16);
  EXPECT_EQ(std::string(status.message()), GetParam().message);
  EXPECT_EQ(absl::IsInvalidArgument(status), !status.ok());
}

INSTANTIATE_TEST_SUITE_P(
    Cases, SharedWishSpec,
    testing::Values(
        SharedWishCase{"nothing", [](auto&) {}, ""},
        SharedWishCase{"as_held",
                       [](auto& r) {
                         r.set_dtype(v1::BF16);
                         r.set_layout(v1::HND);
                       },
                       ""},
        SharedWishCase{"another_dtype", [](auto& r) { r.set_dtype(v1::F16); },
                       "dtype F16 with shared_memory true: the cache is held as BF16, "
                       "and only that is in shared memory"},
        SharedWishCase{"fp8", [](auto& r) { r.set_dtype(v1::F8_E4M3); },
                       "dtype F8_E4M3 with shared_memory true: the cache is held as "
                       "BF16, and only that is in shared memory"},
        SharedWishCase{"another_layout", [](auto& r) { r.set_layout(v1::NHD); },
                       "layout NHD with shared_memory true: the cache is held as HND, "
                       "and only that is in shared memory"},
        SharedWishCase{"queries", [](auto& r) { r.set_queries(true); },
                       "queries true with shared_memory true: captured queries are not "
                       "in shared memory"}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
