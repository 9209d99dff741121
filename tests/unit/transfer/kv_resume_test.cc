// Spec: FetchRequest.resume of kv.proto; KvPlace of server/transfer/kv_exporter.h.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "server/transfer/kv_exporter.h"
#include "tests/support/case_name.h"
#include "tests/support/kv_fixture.h"

namespace pbs::server {
namespace {

constexpr uint64_t kEpoch = 5;
// Small enough to resume at every row.
constexpr KvShape kShape = {2, 3, 32, 150, DType::kBF16};
constexpr KvRange kWhole = {0, 2, 0, 150, 0, 3};
constexpr KvRange kPart = {0, 2, 7, 139, 1, 2};  // begins and ends inside pages

using ArrayName = std::pair<int32_t, int>;  // layer, kind

// What a consumer has of a fetch.
struct Received {
  std::map<ArrayName, std::vector<std::byte>> arrays;
  // By layer, kind, head and page
  std::map<std::tuple<int32_t, int, int32_t, int32_t>, float> scales;
  int64_t bytes = 0;
};

void AddScales(const wire::KvChunk& chunk, int32_t page_tokens, Received& into) {
  std::vector<float> scales(chunk.scales.size() / sizeof(float));
  chunk.scales.CopyTo(reinterpret_cast<std::byte*>(scales.data()));
  size_t i = 0;
  for (int32_t head = 0; head < chunk.head_count && i < scales.size(); ++head) {
    const int32_t last = (chunk.token_begin + chunk.token_count - 1) / page_tokens;
    for (int32_t page = chunk.token_begin / page_tokens; page <= last; ++page) {
      const auto [at, is_new] = into.scales.emplace(
          std::tuple(chunk.layer, chunk.kind, chunk.head_begin + head, page),
          scales.at(i));
      ASSERT_TRUE(is_new || at->second == scales[i]) << "page " << page;
      ++i;
    }
  }
  ASSERT_EQ(i, scales.size());
}

// Adds what a fetch that begins at `resume` sends, and checks its order and digests.
void Receive(const std::shared_ptr<HeldKv>& kv, const KvRange& range,
             const KvFormat& format, const std::optional<KvPlace>& resume,
             Received& into) {
  const auto exporter =
      *KvExporter::Create(kv, kEpoch, range, format, KvContent::kKeysAndValues, resume);
  wire::LayerDigest digest;
  const int64_t before = into.bytes;
  while (!exporter->done()) {
    const wire::KvChunk chunk = exporter->Next();
    auto& array = into.arrays[{chunk.layer, chunk.kind}];
    ASSERT_EQ(chunk.byte_offset, array.size());
    ASSERT_LE(chunk.payload.size() + chunk.scales.size(),
              static_cast<size_t>(format.chunk_bytes));
    array.resize(array.size() + chunk.payload.size());
    chunk.payload.CopyTo(array.data() + chunk.byte_offset);
    into.bytes += static_cast<int64_t>(chunk.payload.size());
    AddScales(chunk, format.page_tokens, into);
    const int32_t end = chunk.token_begin + chunk.token_count;
    ASSERT_TRUE(end % format.page_tokens == 0 ||
                end == range.token_begin + range.token_count);
    digest.Add(chunk.crc32c.value());
    if (chunk.layer_digest.has_value()) {
      ASSERT_EQ(chunk.layer_digest, digest.value());
      digest = {};
    }
  }
  ASSERT_EQ(digest.value(), 0u);  // every layer ended with one
  ASSERT_EQ(exporter->total_bytes(), into.bytes - before);
  ASSERT_EQ(exporter->held_bytes(), (into.bytes - before) /
                                        format.ElementBytes(kShape.dtype) *
                                        DTypeBytes(kShape.dtype));
}

struct ResumeCase {
  const char* name;
  KvRange range;
  KvFormat format;
};

class KvResumeSpec : public testing::TestWithParam<ResumeCase> {};

TEST_P(KvResumeSpec, EveryPlaceGoesOnToTheBytesOfTheWholeFetch) {
  const auto& [name, range, format] = GetParam();
  const auto kv = testing_support::MakeHeldKv(kShape);
  Received whole;
  Receive(kv, range, format, std::nullopt, whole);
  const bool nhd = format.layout == KvLayout::kNhd;
  const int64_t row_bytes = kShape.head_dim * format.ElementBytes(kShape.dtype);
  for (auto kind : {v1::KvChunk::K, v1::KvChunk::V}) {
    for (int32_t h = 0; h < (nhd ? 1 : range.head_count); ++h) {
      for (int32_t t = 0; t < range.token_count; ++t) {
        const KvPlace place = {kind, range.head_begin + h, range.token_begin + t};
        SCOPED_TRACE(testing::Message() << v1::KvChunk::Kind_Name(kind) << " head "
                                        << place.head << " token " << place.token);
        const int64_t row =
            nhd ? int64_t{t} * range.head_count : int64_t{h} * range.token_count + t;
        Received had;
        const ArrayName running = {range.layer_begin, kind};
        const std::vector<std::byte>& array = whole.arrays.at(running);
        had.arrays[running].assign(array.begin(), array.begin() + row * row_bytes);
        had.bytes = row * row_bytes;
        if (kind == v1::KvChunk::V) {
          const ArrayName keys = {range.layer_begin, v1::KvChunk::K};
          had.arrays[keys] = whole.arrays.at(keys);
          had.bytes += static_cast<int64_t>(had.arrays[keys].size());
        }
        ASSERT_NO_FATAL_FAILURE(Receive(kv, range, format, place, had));
        ASSERT_EQ(had.bytes, whole.bytes);
        ASSERT_EQ(had.arrays, whole.arrays);
        for (const auto& [page, scale] : had.scales) {
          ASSERT_EQ(scale, whole.scales.at(page));
        }
      }
    }
  }
}

KvFormat Format(KvLayout layout, int32_t page_tokens, int32_t chunk_bytes,
                std::optional<DType> dtype = {}, bool fp8 = false) {
  KvFormat format;
  format.dtype = dtype;
  format.layout = layout;
  format.page_tokens = page_tokens;
  format.chunk_bytes = chunk_bytes;
  format.fp8 = fp8;
  return format;
}

constexpr KvLayout kHnd = KvLayout::kHnd, kNhd = KvLayout::kNhd;

INSTANTIATE_TEST_SUITE_P(
    Formats, KvResumeSpec,
    testing::Values(
        ResumeCase{"hnd", kWhole, Format(kHnd, 1, 3000)},
        ResumeCase{"hnd_page_16", kWhole, Format(kHnd, 16, 3000)},
        ResumeCase{"hnd_page_128", kWhole, Format(kHnd, 128, 9000)},
        ResumeCase{"hnd_heads_together", kWhole, Format(kHnd, 1, 20'000)},
        ResumeCase{"hnd_part", kPart, Format(kHnd, 1, 3000)},
        ResumeCase{"hnd_part_page_16", kPart, Format(kHnd, 16, 3000)},
        ResumeCase{"hnd_part_page_128", kPart, Format(kHnd, 128, 9000)},
        ResumeCase{"hnd_f32_page_16", kPart, Format(kHnd, 16, 5000, DType::kF32)},
        ResumeCase{"nhd", kWhole, Format(kNhd, 1, 3000)},
        ResumeCase{"nhd_page_16", kWhole, Format(kNhd, 16, 9000)},
        ResumeCase{"nhd_page_128", kWhole, Format(kNhd, 128, 25'000)},
        ResumeCase{"nhd_part_page_16", kPart, Format(kNhd, 16, 5000, DType::kF16)},
        ResumeCase{"nhd_part_page_128", kPart, Format(kNhd, 128, 20'000)},
        ResumeCase{"nhd_one_head", {0, 2, 3, 100, 2, 1}, Format(kNhd, 16, 3000)},
        ResumeCase{"fp8_hnd", kPart, Format(kHnd, 1, 1500, {}, true)},
        ResumeCase{"fp8_hnd_page_16", kWhole, Format(kHnd, 16, 1500, {}, true)},
        ResumeCase{"fp8_hnd_page_128", kPart, Format(kHnd, 128, 5000, {}, true)},
        ResumeCase{"fp8_hnd_heads_together", kWhole,
                   Format(kHnd, 16, 11'000, {}, true)},
        ResumeCase{"fp8_nhd_page_16", kPart, Format(kNhd, 16, 3000, {}, true)},
        ResumeCase{"fp8_nhd_page_128", kWhole, Format(kNhd, 128, 15'000, {}, true)}),
    testing_support::CaseName());

struct PlaceCase {
  const char* name;
  std::function<void(v1::FetchRequest&)> change;  // of a resume at V, head 1, token 7
  const char* message;                            // "" when accepted
};

class KvPlaceSpec : public testing::TestWithParam<PlaceCase> {};

TEST_P(KvPlaceSpec, MustLieInsideTheRequestedRange) {
  v1::FetchRequest request;
  request.mutable_resume()->set_kind(v1::KvChunk::V);
  request.mutable_resume()->set_head(1);
  request.mutable_resume()->set_token(7);
  GetParam().change(request);
  EXPECT_EQ(std::string(DecodeKvPlace(request, kPart).status().message()),
            GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, KvPlaceSpec,
    testing::Values(
        PlaceCase{"the_first_value", [](auto&) {}, ""},
        PlaceCase{"the_last_row",
                  [](auto& r) {
                    r.mutable_resume()->set_head(2);
                    r.mutable_resume()->set_token(145);
                  },
                  ""},
        PlaceCase{"no_kind", [](auto& r) { r.mutable_resume()->clear_kind(); },
                  "resume.kind 0 is not one of K (1), V (2)"},
        PlaceCase{"kind_of_queries",
                  [](auto& r) { r.mutable_resume()->set_kind(v1::KvChunk::Q); },
                  "resume.kind 3 is not one of K (1), V (2)"},
        PlaceCase{"queries_of_another_kind", [](auto& r) { r.set_queries(true); },
                  "resume.kind 2 is not Q (3), the kind of queries"},
        PlaceCase{"queries",
                  [](auto& r) {
                    r.set_queries(true);
                    r.mutable_resume()->set_kind(v1::KvChunk::Q);
                  },
                  ""},
        PlaceCase{"head_before", [](auto& r) { r.mutable_resume()->set_head(0); },
                  "resume.head 0 is outside [1, 2]"},
        PlaceCase{"head_after", [](auto& r) { r.mutable_resume()->set_head(3); },
                  "resume.head 3 is outside [1, 2]"},
        PlaceCase{"token_before", [](auto& r) { r.mutable_resume()->set_token(6); },
                  "resume.token 6 is outside [7, 145]"},
        PlaceCase{"token_after", [](auto& r) { r.mutable_resume()->set_token(146); },
                  "resume.token 146 is outside [7, 145]"},
        PlaceCase{"token_far_below",
                  [](auto& r) { r.mutable_resume()->set_token(INT32_MIN); },
                  "resume.token -2147483648 is outside [7, 145]"},
        PlaceCase{"token_far_above",
                  [](auto& r) { r.mutable_resume()->set_token(INT32_MAX); },
                  "resume.token 2147483647 is outside [7, 145]"},
        PlaceCase{"nhd", [](auto& r) { r.set_layout(v1::NHD); }, ""},
        PlaceCase{"nhd_inside_a_token",
                  [](auto& r) {
                    r.set_layout(v1::NHD);
                    r.mutable_resume()->set_head(2);
                  },
                  "resume.head 2 is not head_begin 1: in layout NHD a chunk begins "
                  "with the first head of a token"}),
    testing_support::CaseName());

TEST(KvPlaceAbsentSpec, ARequestWithoutOneBegins) {
  const auto place = DecodeKvPlace(v1::FetchRequest(), kPart);
  ASSERT_TRUE(place.ok());
  EXPECT_FALSE(place->has_value());
}

TEST(QueryResumeSpec, GoesOnInsideALayerThatWasCaptured) {
  const QueryShape queries = {6, 32, 150, DType::kBF16};
  const auto kv =
      testing_support::MakeHeldKv(kShape, testing_support::MakeQueries(queries, {1}));
  const KvFormat format = Format(kHnd, 1, 3000);
  const KvPlace place = {v1::KvChunk::Q, 2, 149};
  const auto exporter = *KvExporter::Create(kv, kEpoch, {1, 1, 0, 150, 0, 6}, format,
                                            KvContent::kQueries, place);
  EXPECT_EQ(exporter->total_bytes(), (3 * 150 + 1) * 64);
  const wire::KvChunk chunk = exporter->Next();
  EXPECT_EQ(chunk.byte_offset, (2u * 150 + 149) * 64);
  EXPECT_EQ(chunk.token_begin, 149);
  EXPECT_EQ(chunk.token_count, 1);
  EXPECT_EQ(KvExporter::Create(kv, kEpoch, {0, 2, 0, 150, 0, 6}, format,
                               KvContent::kQueries, place)
                .status(),
            absl::InvalidArgumentError(
                "resume is in layer_begin 0, whose queries were not captured"));
}

}  // namespace
}  // namespace pbs::server
