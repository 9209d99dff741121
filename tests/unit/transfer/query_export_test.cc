// Spec: KvContent::kQueries of server/transfer/kv_exporter.h.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "server/transfer/kv_exporter.h"
#include "tests/support/case_name.h"
#include "tests/support/kv_fixture.h"

namespace pbs::server {
namespace {

using testing_support::KvElement;

constexpr uint64_t kEpoch = 5;
constexpr KvShape kShape = {4, 2, 64, 700, DType::kBF16};
constexpr QueryShape kQueries = {6, 64, 700, DType::kBF16};
constexpr int32_t kChunkBytes = 64 << 10;

std::shared_ptr<HeldKv> Held() {
  return testing_support::MakeHeldKv(kShape,
                                     testing_support::MakeQueries(kQueries, {1, 3}));
}

struct QueryCase {
  const char* name;
  KvRange range;
  KvFormat format;
  std::vector<int32_t> layers;  // that are sent
};

class QueryExportSpec : public testing::TestWithParam<QueryCase> {};

TEST_P(QueryExportSpec, SendsTheQueriesOfCapturedLayersAsAskedFor) {
  const auto& [name, range, format, layers] = GetParam();
  const auto exporter =
      *KvExporter::Create(Held(), kEpoch, range, format, KvContent::kQueries);
  const DType dtype = format.dtype.value_or(kQueries.dtype);
  std::map<int32_t, std::vector<std::byte>> arrays;
  int64_t sent = 0;
  while (!exporter->done()) {
    const wire::KvChunk chunk = exporter->Next();
    ASSERT_EQ(chunk.kind, v1::KvChunk::Q);
    ASSERT_LE(chunk.payload.size(), static_cast<size_t>(format.chunk_bytes));
    auto& array = arrays[chunk.layer];
    ASSERT_EQ(chunk.byte_offset, array.size());
    array.resize(array.size() + chunk.payload.size());
    chunk.payload.CopyTo(array.data() + chunk.byte_offset);
    sent += static_cast<int64_t>(chunk.payload.size());
    const size_t whole = static_cast<size_t>(range.token_count) * range.head_count *
                         kQueries.head_dim * DTypeBytes(dtype);
    EXPECT_EQ(chunk.layer_digest.has_value(), array.size() == whole);
  }
  EXPECT_EQ(sent, exporter->total_bytes());
  ASSERT_EQ(arrays.size(), layers.size());
  const bool nhd = format.layout == KvLayout::kNhd;
  for (int32_t layer : layers) {
    std::vector<float> values(arrays.at(layer).size() / DTypeBytes(dtype));
    ConvertElements(arrays.at(layer).data(), dtype, values.data(), DType::kF32,
                    static_cast<int64_t>(values.size()));
    size_t at = 0;
    for (int32_t a = 0; a < (nhd ? range.token_count : range.head_count); ++a) {
      for (int32_t b = 0; b < (nhd ? range.head_count : range.token_count); ++b) {
        const int64_t token = range.token_begin + (nhd ? a : b);
        const int64_t head = range.head_begin + (nhd ? b : a);
        for (int32_t i = 0; i < kQueries.head_dim; ++i, ++at) {
          const int64_t row = token * kQueries.num_heads + head;
          ASSERT_EQ(values[at], KvElement(-1 - layer, row * kQueries.head_dim + i))
              << "layer " << layer << " element " << at;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, QueryExportSpec,
    testing::Values(QueryCase{"by_head",
                              {0, 4, 0, 700, 0, 6},
                              {.chunk_bytes = kChunkBytes},
                              {1, 3}},
                    QueryCase{"by_token",
                              {0, 4, 0, 700, 0, 6},
                              {.layout = KvLayout::kNhd, .chunk_bytes = kChunkBytes},
                              {1, 3}},
                    QueryCase{"a_part_in_f32",
                              {2, 2, 17, 301, 1, 3},
                              {.dtype = DType::kF32, .chunk_bytes = kChunkBytes},
                              {3}},
                    QueryCase{"a_part_by_token",
                              {0, 2, 17, 301, 4, 2},
                              {.layout = KvLayout::kNhd, .chunk_bytes = kChunkBytes},
                              {1}}),
    testing_support::CaseName());

TEST(QueryExportRefusalSpec, ARangeWithoutACapturedLayerIsRefused) {
  EXPECT_EQ(KvExporter::Create(Held(), kEpoch, {2, 1, 0, 700, 0, 6},
                               {.chunk_bytes = kChunkBytes}, KvContent::kQueries)
                .status(),
            absl::InvalidArgumentError(
                "queries true: none of the layers [2, 3) was captured"));
}

TEST(QueryExportShapeSpec, HeadsAreQueryHeads) {
  EXPECT_EQ(ShapeOf(*Held(), KvContent::kQueries).num_kv_heads, 6);
  EXPECT_EQ(ShapeOf(*Held(), KvContent::kKeysAndValues), kShape);
}

TEST(QueryExportBufferSpec, QueriesAreCopiedToChunks) {
  const KvShape shape = ShapeOf(*Held(), KvContent::kQueries);
  EXPECT_EQ(KvExporter::BufferBytes(shape, WholeRange(shape),
                                    {.chunk_bytes = kChunkBytes}, KvContent::kQueries),
            kChunkBytes);
}

}  // namespace
}  // namespace pbs::server
