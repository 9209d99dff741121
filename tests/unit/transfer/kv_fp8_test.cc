// Spec: F8_E4M3 of kv.proto; server/transfer/kv_exporter.h, proto/wire/fp8_chunk.h.
#include "proto/wire/fp8_chunk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "pbs/e4m3.h"
#include "server/transfer/kv_exporter.h"
#include "tests/support/case_name.h"
#include "tests/support/kv_fixture.h"

namespace pbs::server {
namespace {

constexpr uint64_t kEpoch = 5;
constexpr int32_t kTokens = 300;

KvShape ShapeIn(DType dtype) { return {1, 3, 64, kTokens, dtype}; }

// Random elements, with an outlier in every 997th and zeros in the last page.
std::shared_ptr<HeldKv> Held(DType dtype) {
  const KvShape shape = ShapeIn(dtype);
  KvCache cache = *KvCache::Create(shape, testing_support::OneThreadBackend());
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  for (void* plane : {cache.k(0), cache.v(0)}) {
    const int64_t count = shape.plane_bytes() / DTypeBytes(dtype);
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = normal(rng) * (i % 997 == 0 ? 100 : 1);
    }
    std::fill(values.end() - 12 * 64, values.end(), 0.0f);
    ConvertElements(values.data(), DType::kF32, plane, dtype, count);
  }
  return std::make_shared<HeldKv>(std::move(cache), ByteReservation(),
                                  CapturedQueries());
}

float Element(const HeldKv& kv, int kind, int64_t head, int64_t token, int64_t i) {
  const KvShape& shape = kv.cache().shape();
  const void* plane = kind == v1::KvChunk::K ? kv.cache().k(0) : kv.cache().v(0);
  const int64_t at = (head * shape.capacity + token) * shape.head_dim + i;
  float value = 0;
  ConvertElements(static_cast<const std::byte*>(plane) + at * DTypeBytes(shape.dtype),
                  shape.dtype, &value, DType::kF32, 1);
  return value;
}

// The greatest magnitude of the page that has `token`, over 448.
float ScaleOf(const HeldKv& kv, int kind, int64_t head, int64_t token, int64_t page) {
  float greatest = 0;
  const int64_t begin = token / page * page;
  for (int64_t t = begin; t < std::min<int64_t>(begin + page, kTokens); ++t) {
    for (int64_t i = 0; i < 64; ++i) {
      greatest = std::max(greatest, std::abs(Element(kv, kind, head, t, i)));
    }
  }
  return greatest / 448;
}

struct Fp8Case {
  const char* name;
  DType held;
  KvLayout layout;
  int32_t page_tokens;
  KvRange range;
  int32_t chunk_bytes = 64 << 10;
};

class KvFp8Spec : public testing::TestWithParam<Fp8Case> {
 protected:
  KvFormat format() const {
    KvFormat format;
    format.layout = GetParam().layout;
    format.page_tokens = GetParam().page_tokens;
    format.chunk_bytes = GetParam().chunk_bytes;
    format.fp8 = true;
    return format;
  }
  std::vector<wire::KvChunk> Chunks() const {
    const auto exporter = *KvExporter::Create(kv_, kEpoch, GetParam().range, format());
    std::vector<wire::KvChunk> chunks;
    while (!exporter->done()) chunks.push_back(exporter->Next());
    return chunks;
  }

  const std::shared_ptr<HeldKv> kv_ = Held(GetParam().held);
};

TEST_P(KvFp8Spec, EveryNumberIsWithinTheBoundOfTheHeldOne) {
  const Fp8Case& c = GetParam();
  for (const wire::KvChunk& chunk : Chunks()) {
    ASSERT_EQ(chunk.dtype, v1::F8_E4M3);
    ASSERT_EQ(chunk.crc32c, wire::Crc32cOf(chunk));
    ASSERT_EQ(wire::CheckScales(chunk, c.page_tokens), "");
    std::vector<float> numbers(chunk.payload.size());
    wire::WidenFp8(chunk, c.page_tokens, 64, v1::F32,
                   reinterpret_cast<std::byte*>(numbers.data()));
    for (size_t at = 0; at < numbers.size(); at += 64) {
      const auto row = static_cast<int64_t>(at / 64);
      const bool nhd = c.layout == KvLayout::kNhd;
      const int64_t inner = nhd ? chunk.head_count : chunk.token_count;
      const int64_t token = chunk.token_begin + (nhd ? row / inner : row % inner);
      const int64_t head = chunk.head_begin + (nhd ? row % inner : row / inner);
      const double scale = ScaleOf(*kv_, chunk.kind, head, token, c.page_tokens);
      for (int64_t i = 0; i < 64; ++i) {
        const double held = Element(*kv_, chunk.kind, head, token, i);
        const double bound = std::max(std::abs(held) / 16, scale * 0x1p-10);
        ASSERT_LE(std::abs(numbers[at + static_cast<size_t>(i)] - held),
                  bound * (1 + 0x1p-20))
            << "head " << head << " token " << token << " element " << i;
      }
    }
  }
}

TEST_P(KvFp8Spec, AChunkWithItsScalesFitsChunkBytes) {
  const Fp8Case& c = GetParam();
  int64_t payload = 0;
  for (const wire::KvChunk& chunk : Chunks()) {
    ASSERT_LE(chunk.payload.size() + chunk.scales.size(),
              static_cast<size_t>(c.chunk_bytes));
    payload += static_cast<int64_t>(chunk.payload.size());
  }
  EXPECT_EQ(payload, 2ll * c.range.token_count * c.range.head_count * 64);
  EXPECT_EQ(KvExporter::BufferBytes(ShapeIn(c.held), c.range, format()), c.chunk_bytes);
}

constexpr KvRange kWhole = {0, 1, 0, kTokens, 0, 3};
constexpr KvRange kPart = {0, 1, 5, 201, 1, 2};
constexpr KvLayout kHnd = KvLayout::kHnd, kNhd = KvLayout::kNhd;

INSTANTIATE_TEST_SUITE_P(
    Cases, KvFp8Spec,
    testing::Values(Fp8Case{"f32", DType::kF32, kHnd, 16, kWhole},
                    Fp8Case{"f16", DType::kF16, kHnd, 16, kWhole},
                    Fp8Case{"bf16", DType::kBF16, kHnd, 16, kWhole},
                    Fp8Case{"page_of_one_token", DType::kBF16, kHnd, 1, kPart},
                    Fp8Case{"page_of_128", DType::kF32, kHnd, 128, kPart},
                    Fp8Case{"page_of_more_than_all", DType::kBF16, kHnd, 4096, kPart},
                    Fp8Case{"small_chunks", DType::kBF16, kHnd, 16, kPart, 2200},
                    Fp8Case{"heads_together", DType::kBF16, kHnd, 16, kWhole, 40'000},
                    // Without their scales these would fit.
                    Fp8Case{"a_head_too_many", DType::kBF16, kHnd, 16, kWhole, 57'700},
                    Fp8Case{"a_page_too_many", DType::kBF16, kHnd, 16, kPart, 1735},
                    Fp8Case{"nhd", DType::kF16, kNhd, 16, kWhole},
                    Fp8Case{"nhd_part", DType::kBF16, kNhd, 16, kPart, 3000},
                    Fp8Case{"nhd_page_of_one", DType::kF32, kNhd, 1, kPart, 700}),
    testing_support::CaseName());

TEST(KvFp8WireSpec, APageOf16TokensOfHeadDim64TakesAtMostAsMuchAs52PercentOfBf16) {
  const auto kv = Held(DType::kBF16);
  const auto sent = [&](bool fp8) {
    KvFormat format;
    format.page_tokens = 16;
    format.chunk_bytes = 1 << 20;
    format.fp8 = fp8;
    const auto exporter = *KvExporter::Create(kv, kEpoch, kWhole, format);
    size_t bytes = 0;
    while (!exporter->done()) bytes += wire::EncodeKvChunk(exporter->Next()).Length();
    return static_cast<double>(bytes);
  };
  EXPECT_LE(sent(true), 0.52 * sent(false));
}

TEST(KvFp8PageSpec, APageAndItsScalesMustFitAChunk) {
  KvFormat format;
  format.page_tokens = 256;
  format.chunk_bytes = 16'000;
  format.fp8 = true;
  EXPECT_EQ(KvExporter::Create(Held(DType::kBF16), kEpoch, kWhole, format).status(),
            absl::InvalidArgumentError(
                "a page of 256 tokens has 16396 bytes, more than chunk_bytes 16000"));
}

TEST(KvFp8FormatSpec, QueriesAreRefused) {
  v1::FetchRequest request;
  request.set_dtype(v1::F8_E4M3);
  ASSERT_TRUE(DecodeKvFormat(request, 1 << 20).ok());
  EXPECT_TRUE(DecodeKvFormat(request, 1 << 20)->fp8);
  request.set_queries(true);
  EXPECT_EQ(DecodeKvFormat(request, 1 << 20).status(),
            absl::InvalidArgumentError(
                "dtype F8_E4M3 of queries is not one of F32, F16, BF16"));
}

TEST(KvFp8FormatSpec, AnInlineDeliveryHasPages) {
  v1::KvDelivery::Inline delivery;
  delivery.set_dtype(v1::F8_E4M3);
  delivery.set_page_tokens(16);
  const auto format = DecodeKvFormat(delivery, 1 << 20);
  ASSERT_TRUE(format.ok());
  EXPECT_TRUE(format->fp8);
  EXPECT_EQ(format->page_tokens, 16);
  delivery.set_page_tokens(0);
  EXPECT_EQ(std::string(DecodeKvFormat(delivery, 1 << 20).status().message()),
            "page_tokens 0 is outside [1, 1048576]");
}

// ---- the consumer's side

// 2 heads of tokens 3..6, pages of 4 tokens: 2 pages of each head.
wire::KvChunk SmallChunk() {
  wire::KvChunk chunk;
  chunk.token_begin = 3;
  chunk.token_count = 4;
  chunk.head_count = 2;
  chunk.layout = v1::HND;
  const std::vector<float> scales = {1, 2, 4, 8};
  chunk.scales = wire::Payload(grpc::Slice(scales.data(), 16));
  // Head dim 1: the numbers 1, 1.5, NaN, -448, then -0, 2^-9, 1, 1.
  const std::vector<uint8_t> bytes = {0x38, 0x3C, 0x7F, 0xFE, 0x80, 0x01, 0x38, 0x38};
  chunk.payload.Append(grpc::Slice(bytes.data(), 3));  // in pieces
  chunk.payload.Append(grpc::Slice(bytes.data() + 3, 5));
  return chunk;
}

TEST(WidenFp8Spec, MultipliesEveryNumberByTheScaleOfItsPage) {
  std::vector<float> numbers(8);
  wire::WidenFp8(SmallChunk(), 4, 1, v1::F32,
                 reinterpret_cast<std::byte*>(numbers.data()));
  EXPECT_EQ(numbers[0], 1.0f);
  EXPECT_EQ(numbers[1], 3.0f);
  EXPECT_TRUE(std::isnan(numbers[2]));
  EXPECT_EQ(numbers[3], -896.0f);
  EXPECT_TRUE(std::signbit(numbers[4]));
  EXPECT_EQ(numbers[4], 0.0f);
  EXPECT_EQ(numbers[5], 8 * 0x1p-9f);
  EXPECT_EQ(numbers[6], 8.0f);
}

TEST(WidenFp8Spec, RoundsToTheStoredDtype) {
  std::vector<bf16> small(8);
  wire::WidenFp8(SmallChunk(), 4, 1, v1::BF16,
                 reinterpret_cast<std::byte*>(small.data()));
  EXPECT_EQ(ToFloat(small[3]), -896.0f);
  std::vector<f16> half(8);
  wire::WidenFp8(SmallChunk(), 4, 1, v1::F16,
                 reinterpret_cast<std::byte*>(half.data()));
  EXPECT_EQ(ToFloat(half[5]), 8 * 0x1p-9f);
  EXPECT_TRUE(std::isnan(ToFloat(half[2])));
}

TEST(CheckScalesSpec, NamesWhatIsWrong) {
  wire::KvChunk chunk = SmallChunk();
  EXPECT_EQ(wire::CheckScales(chunk, 4), "");
  EXPECT_EQ(wire::CheckScales(chunk, 16), "has 16 bytes of scales, not 8");
  for (const float wrong : {-1.0f, HUGE_VALF, std::nanf("")}) {
    const std::vector<float> scales = {1, 2, wrong, 8};
    chunk.scales = wire::Payload(grpc::Slice(scales.data(), 16));
    EXPECT_EQ(wire::CheckScales(chunk, 4),
              "has a scale that is negative or not finite");
  }
}

}  // namespace
}  // namespace pbs::server
