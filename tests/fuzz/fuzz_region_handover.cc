// Spec: proto/wire/region_handover.h. What is accepted is written again byte by byte.
//
// Input: a record.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>

#include "proto/wire/region_handover.h"

namespace {

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_region_handover: %s\n", what);
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto record = std::as_bytes(std::span(data, size));
  if (const auto request = pbs::wire::DecodeRegionRequest(record)) {
    const auto again = pbs::wire::EncodeRegionRequest(*request);
    Require(again.has_value() && std::ranges::equal(*again, record),
            "another request is written");
  }
  if (const auto reply = pbs::wire::DecodeRegionReply(record)) {
    Require(std::ranges::equal(pbs::wire::EncodeRegionReply(*reply), record),
            "another reply is written");
  }
  return 0;
}
