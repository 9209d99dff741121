#include "proto/wire/fp8_chunk.h"

#include <array>
#include <cstring>
#include <limits>
#include <vector>

#include "pbs/dtype.h"
#include "pbs/e4m3.h"

namespace pbs::wire {
namespace {

constexpr std::array<float, 256> kNumbers = [] {
  std::array<float, 256> numbers = {};
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = E4m3ToFloat(static_cast<uint8_t>(i));
  }
  return numbers;
}();

std::vector<std::byte> Flatten(const Payload& payload) {
  std::vector<std::byte> bytes(payload.size());
  payload.CopyTo(bytes.data());
  return bytes;
}

std::vector<float> Scales(const KvChunk& chunk) {
  std::vector<float> scales(chunk.scales.size() / sizeof(float));
  const std::vector<std::byte> bytes = Flatten(chunk.scales);
  std::memcpy(scales.data(), bytes.data(), scales.size() * sizeof(float));
  return scales;
}

int64_t PagesOf(const KvChunk& chunk, int64_t page_tokens) {
  const int64_t begin = chunk.token_begin;
  return (begin + chunk.token_count - 1) / page_tokens - begin / page_tokens + 1;
}

template <class T>
void Widen(const KvChunk& chunk, int64_t page_tokens, int64_t head_dim, T* target) {
  const std::vector<float> scales = Scales(chunk);
  const std::vector<std::byte> bytes = Flatten(chunk.payload);
  const auto* source = reinterpret_cast<const uint8_t*>(bytes.data());
  const bool nhd = chunk.layout == v1::NHD;
  const int64_t pages = PagesOf(chunk, page_tokens);
  const int64_t first_page = chunk.token_begin / page_tokens;
  const int64_t inner = nhd ? chunk.head_count : chunk.token_count;
  const int64_t rows = int64_t{chunk.token_count} * chunk.head_count;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t head = nhd ? row % inner : row / inner;
    const int64_t token = chunk.token_begin + (nhd ? row / inner : row % inner);
    const float scale =
        scales[static_cast<size_t>(head * pages + token / page_tokens - first_page)];
    for (int64_t i = row * head_dim; i < (row + 1) * head_dim; ++i) {
      target[i] = FromFloat<T>(kNumbers[source[i]] * scale);
    }
  }
}

}  // namespace

std::string CheckScales(const KvChunk& chunk, int32_t page_tokens) {
  const auto expected =
      static_cast<size_t>(chunk.head_count * PagesOf(chunk, page_tokens)) *
      sizeof(float);
  if (chunk.scales.size() != expected) {
    return "has " + std::to_string(chunk.scales.size()) + " bytes of scales, not " +
           std::to_string(expected);
  }
  for (const float scale : Scales(chunk)) {
    if (!(scale >= 0 && scale <= std::numeric_limits<float>::max())) {
      return "has a scale that is negative or not finite";
    }
  }
  return "";
}

void WidenFp8(const KvChunk& chunk, int32_t page_tokens, int32_t head_dim,
              v1::DType dtype, std::byte* target) {
  if (dtype == v1::F16) {
    Widen(chunk, page_tokens, head_dim, reinterpret_cast<f16*>(target));
  } else if (dtype == v1::BF16) {
    Widen(chunk, page_tokens, head_dim, reinterpret_cast<bf16*>(target));
  } else {
    Widen(chunk, page_tokens, head_dim, reinterpret_cast<float*>(target));
  }
}

}  // namespace pbs::wire
