// Spec: server/codec/prefill_request.h and attend_request.h. Whatever a client sends,
// the validators answer with a status or with values that can be planned: no overflow,
// no size past what the limits allow.
//
// Input: one byte that picks the message, then its bytes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "server/codec/attend_request.h"
#include "server/codec/prefill_request.h"

namespace {

using pbs::server::AttendSpec;

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_request_validator: %s\n", what);
  std::abort();
}

void CheckAttend(const AttendSpec& spec) {
  Require(pbs::ValidateProblem(spec.problem).ok(), "accepts an invalid problem");
  const auto& shape = spec.problem.shape;
  int64_t rows_q = 0, rows_k = 0;
  for (const auto& sequence : shape.sequences) {
    rows_q += sequence.q_len;
    rows_k += sequence.k_len;
  }
  const int64_t row = shape.head_dim * pbs::DTypeBytes(spec.problem.dtype);
  for (const auto& upload : spec.uploads) {
    Require(upload.bytes >= 0 && upload.bytes < int64_t{1} << 50, "a size overflowed");
    if (upload.tensor == pbs::v1::Q) {
      Require(upload.bytes == rows_q * shape.num_heads * row, "Q has another size");
    }
    if (upload.tensor == pbs::v1::K) {
      Require(upload.bytes == rows_k * shape.num_kv_heads * row, "K has another size");
    }
  }
  Require(spec.repetitions >= 1 && spec.repetitions <= 1000, "repetitions");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const uint8_t which = data[0] % 2;
  ++data;
  --size;
  if (which == 0) {
    pbs::v1::AttendHeader header;
    if (!header.ParseFromArray(data, static_cast<int>(size))) return 0;
    pbs::server::AttendLimits limits;
    limits.tokens_max = 1 << 16;
    const auto spec = DecodeAttendHeader(header, limits);
    if (spec.ok()) CheckAttend(*spec);
    Require(spec.ok() || !spec.status().message().empty(), "refuses without a word");
    return 0;
  }
  pbs::v1::PrefillRequest request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return 0;
  pbs::server::PrefillLimits limits;
  limits.tokens_max = 4096;
  limits.vocab_size = 1000;
  limits.num_layers = 2;
  limits.num_heads = 4;
  limits.num_kv_heads = 2;
  limits.head_dim = 64;
  limits.chunk_bytes_default = 1 << 20;
  const std::vector<pbs::server::Profile> profiles = {pbs::server::PaperProfile()};
  limits.profiles = profiles;
  limits.has_deadline = true;
  const std::vector<std::string> sinks = {"sink:1"};
  limits.push_targets = sinks;
  const auto spec = DecodePrefill(request, limits);
  if (!spec.ok()) {
    Require(!spec.status().message().empty(), "refuses without a word");
    return 0;
  }
  Require(
      spec->delivery != pbs::server::Delivery::kPush || spec->push_target == sinks[0],
      "a target that is not allowed");
  for (int32_t token : spec->tokens) Require(token >= 0 && token < 1000, "a bad token");
  for (int32_t position : spec->logit_positions) {
    Require(position < static_cast<int32_t>(spec->tokens.size()), "a bad position");
  }
  const size_t num_thresholds = spec->head_thresholds.size();
  Require(num_thresholds == 0 || num_thresholds == 8, "another number of heads");
  for (float threshold : spec->head_thresholds) {
    Require(threshold > 0 && threshold <= 1, "a bad threshold of a head");
  }
  const float lowest = spec->threshold_min.value_or(spec->attention.threshold);
  Require(lowest > 0 && lowest <= spec->attention.threshold, "a bad threshold_min");
  for (int32_t layer : spec->query_layers)
    Require(layer >= 0 && layer < 2, "a bad layer");
  Require(!pbs::server::PrefillFingerprint(*spec, "m").empty(), "no fingerprint");
  return 0;
}
