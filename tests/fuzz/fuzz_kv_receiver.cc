// Spec: client/cpp/kv_receiver.h. Whatever a server sends, nothing is written outside
// the target's arrays, and a transfer that is complete wrote every byte.
//
// Input: one byte of choices, then chunks: two bytes of length, a KvChunk.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "client/cpp/kv_receiver.h"

namespace {

using pbs::client::KvExpectation;
using pbs::client::KvReceiver;

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_kv_receiver: %s\n", what);
  std::abort();
}

// Arrays whose ends the address sanitizer watches.
struct Target final : pbs::client::KvTarget {
  std::span<std::byte> Array(int32_t layer, pbs::v1::KvChunk::Kind kind,
                             int64_t bytes) override {
    auto& array = arrays[{layer, kind}];
    array.assign(static_cast<size_t>(bytes), std::byte{0});
    return array;
  }
  void OnLayer(int32_t) override { ++layers; }

  std::map<std::pair<int32_t, int>, std::vector<std::byte>> arrays;
  int layers = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  KvExpectation expected;
  expected.layer_count = 2;
  expected.token_begin = 3;
  expected.token_count = 6;
  expected.head_begin = 1;
  expected.head_count = 2;
  expected.head_dim = 2;
  expected.dtype = (data[0] & 1) != 0 ? pbs::v1::F8_E4M3 : pbs::v1::F16;
  expected.stored = (data[0] & 2) != 0 ? pbs::v1::F32 : pbs::v1::BF16;
  expected.layout = (data[0] & 4) != 0 ? pbs::v1::NHD : pbs::v1::HND;
  expected.checksums = (data[0] & 8) != 0;
  expected.page_tokens = 1 + (data[0] >> 4);
  Target target;
  KvReceiver receiver(expected, target);
  for (size_t at = 1; at + 2 <= size;) {
    const size_t length = size_t{data[at]} << 8 | data[at + 1];
    at += 2;
    if (length > size - at) break;
    const grpc::Slice slice(data + at, length);
    at += length;
    pbs::wire::KvChunk chunk;
    if (!pbs::wire::DecodeKvChunk(grpc::ByteBuffer(&slice, 1), &chunk).ok()) break;
    if (!receiver.Add(chunk).ok()) {
      if (receiver.complete()) break;
      receiver.Resume();  // what was good is kept
      const auto place = receiver.place();
      Require(!place.has_value() || (place->head() >= 1 && place->head() < 3 &&
                                     place->token() >= 3 && place->token() < 9),
              "a place outside the range");
    }
  }
  Require(target.layers == receiver.layer(), "layers were skipped");
  if (receiver.complete()) {
    Require(receiver.bytes() == 4 * expected.array_bytes(), "complete without bytes");
    Require(target.arrays.size() == 4, "complete without arrays");
  }
  return 0;
}
