// Spec: server/codec/chunk_assembler.h. Whatever chunks come, a tensor holds exactly
// the bytes that were accepted for it, and nothing is written outside.
//
// Input: sizes of two tensors, then chunks {tensor, offset, size}.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "server/codec/chunk_assembler.h"

namespace {

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_chunk_assembler: %s\n", what);
  std::abort();
}

// Reads numbers off the input; zeros behind its end.
struct Input {
  const uint8_t* data;
  size_t size;

  uint64_t Take(size_t bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < bytes && size > 0; ++i, ++data, --size) {
      value = value << 8 | *data;
    }
    return value;
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using pbs::server::ChunkAssembler;
  namespace v1 = pbs::v1;
  Input input{data, size};
  std::string targets[2] = {std::string(input.Take(1), '\0'),
                            std::string(input.Take(1), '\0')};
  size_t received[2] = {0, 0};
  const v1::TensorName names[2] = {v1::Q, v1::K};
  ChunkAssembler assembler;
  for (int i = 0; i < 2; ++i) {
    assembler.Expect(names[i], std::as_writable_bytes(std::span(targets[i])));
  }
  while (input.size > 0) {
    const uint64_t which = input.Take(1) % 3;
    // Mostly the expected offset, so that uploads get far.
    const uint64_t choice = input.Take(1);
    uint64_t offset = which < 2 ? received[which] : 0;
    if (choice == 0) offset = input.Take(8);
    if (choice == 1) ++offset;
    const std::string bytes(input.Take(1), static_cast<char>('a' + which));
    const bool fits = which < 2 && offset == received[which] &&
                      bytes.size() <= targets[which].size() - received[which] &&
                      (!bytes.empty() || targets[which].empty());
    const v1::TensorName name = which < 2 ? names[which] : v1::V;
    const auto status =
        assembler.Add({name, offset, pbs::wire::Payload(grpc::Slice(bytes))});
    Require(status.ok() == fits, "accepts other chunks than it says");
    if (fits) received[which] += bytes.size();
  }
  bool whole = true;
  for (size_t i = 0; i < 2; ++i) {
    for (size_t k = 0; k < targets[i].size(); ++k) {
      const char expected = k < received[i] ? static_cast<char>('a' + i) : '\0';
      Require(targets[i][k] == expected, "holds other bytes than were accepted");
    }
    whole &= received[i] == targets[i].size();
  }
  Require(assembler.Finish().ok() == whole, "is wrong about being whole");
  return 0;
}
