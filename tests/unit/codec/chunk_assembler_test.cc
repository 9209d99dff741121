// Spec: server/codec/chunk_assembler.h.
#include "server/codec/chunk_assembler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

wire::TensorChunk Chunk(v1::TensorName tensor, uint64_t offset,
                        const std::string& data) {
  return {tensor, offset, wire::Payload(grpc::Slice(data))};
}

struct Upload {
  std::string q = std::string(10, '.');
  std::string k = std::string(6, '.');
  std::string none;
  ChunkAssembler assembler;

  Upload() {
    assembler.Expect(v1::Q, std::as_writable_bytes(std::span(q)));
    assembler.Expect(v1::K, std::as_writable_bytes(std::span(k)));
    assembler.Expect(v1::ORDER, std::as_writable_bytes(std::span(none)));
  }
};

TEST(ChunkAssemblerSpec, TakesTensorsInAnyInterleavingAndChunkSizes) {
  std::string q(1000, 'q'), k(700, 'k');
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<char>(i);
  for (uint32_t seed = 0; seed < 100; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed=" << seed);
    std::mt19937 rng(seed);
    std::string got_q(q.size(), 0), got_k(k.size(), 0);
    ChunkAssembler assembler;
    assembler.Expect(v1::Q, std::as_writable_bytes(std::span(got_q)));
    assembler.Expect(v1::K, std::as_writable_bytes(std::span(got_k)));
    size_t sent_q = 0, sent_k = 0;
    while (sent_q < q.size() || sent_k < k.size()) {
      const bool send_q = sent_k == k.size() || (sent_q < q.size() && rng() % 2 == 0);
      const std::string& source = send_q ? q : k;
      size_t& sent = send_q ? sent_q : sent_k;
      const size_t size = std::min<size_t>(1 + rng() % 100, source.size() - sent);
      ASSERT_TRUE(
          assembler.Add(Chunk(send_q ? v1::Q : v1::K, sent, source.substr(sent, size)))
              .ok());
      sent += size;
    }
    EXPECT_TRUE(assembler.Finish().ok());
    EXPECT_EQ(got_q, q);
    EXPECT_EQ(got_k, k);
  }
}

struct RefusedChunk {
  const char* name;
  wire::TensorChunk chunk;  // after 4 bytes of Q
  const char* message;
};

class RefusedChunkSpec : public testing::TestWithParam<RefusedChunk> {};

TEST_P(RefusedChunkSpec, NamesTensorOffsetExpectationAndSizeAndChangesNothing) {
  Upload upload;
  ASSERT_TRUE(upload.assembler.Add(Chunk(v1::Q, 0, "abcd")).ok());
  const absl::Status status = upload.assembler.Add(GetParam().chunk);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::string(status.message()), GetParam().message);
  EXPECT_EQ(upload.q, "abcd......");
  EXPECT_EQ(upload.k, "......");
  EXPECT_EQ(upload.assembler.Received(v1::Q).size(), 4u);
  EXPECT_EQ(upload.assembler.Received(v1::K).size(), 0u);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedChunkSpec,
    testing::Values(
        RefusedChunk{"gap", Chunk(v1::Q, 5, "x"),
                     "tensor Q: chunk of 1 bytes at offset 5 leaves a gap; expected "
                     "offset 4 of 10 bytes"},
        RefusedChunk{
            "gap_past_the_end", Chunk(v1::Q, UINT64_MAX, "x"),
            "tensor Q: chunk of 1 bytes at offset 18446744073709551615 leaves a "
            "gap; expected offset 4 of 10 bytes"},
        RefusedChunk{"duplicate", Chunk(v1::Q, 0, "abcd"),
                     "tensor Q: chunk of 4 bytes at offset 0 repeats bytes; expected "
                     "offset 4 of 10 bytes"},
        RefusedChunk{"overlap", Chunk(v1::Q, 3, "xyz"),
                     "tensor Q: chunk of 3 bytes at offset 3 repeats bytes; expected "
                     "offset 4 of 10 bytes"},
        RefusedChunk{"past_the_end", Chunk(v1::Q, 4, "1234567"),
                     "tensor Q: chunk of 7 bytes at offset 4 ends past the tensor; "
                     "expected offset 4 of 10 bytes"},
        RefusedChunk{
            "empty", Chunk(v1::K, 0, ""),
            "tensor K: chunk of 0 bytes at offset 0 is empty; expected offset 0 "
            "of 6 bytes"},
        RefusedChunk{"not_announced", Chunk(v1::V, 0, "x"),
                     "chunk of tensor V, which the header does not announce"},
        RefusedChunk{
            "no_tensor", Chunk(static_cast<v1::TensorName>(42), 0, "x"),
            "chunk of tensor TensorName 42, which the header does not announce"},
        RefusedChunk{
            "unspecified", Chunk(v1::TENSOR_NAME_UNSPECIFIED, 0, "x"),
            "chunk of tensor TENSOR_NAME_UNSPECIFIED, which the header does not "
            "announce"},
        RefusedChunk{"bytes_for_an_empty_tensor", Chunk(v1::ORDER, 0, "x"),
                     "tensor ORDER: chunk of 1 bytes at offset 0 ends past the tensor; "
                     "expected offset 0 of 0 bytes"}),
    testing_support::CaseName());

TEST(ChunkAssemblerSpec, AnEmptyTensorIsWholeWithAndWithoutAnEmptyChunk) {
  Upload upload;
  ASSERT_TRUE(upload.assembler.Add(Chunk(v1::Q, 0, "0123456789")).ok());
  ASSERT_TRUE(upload.assembler.Add(Chunk(v1::K, 0, "012345")).ok());
  EXPECT_TRUE(upload.assembler.Finish().ok());
  EXPECT_TRUE(upload.assembler.Add(Chunk(v1::ORDER, 0, "")).ok());
  EXPECT_TRUE(upload.assembler.Finish().ok());
}

TEST(ChunkAssemblerSpec, AnUploadThatEndsEarlyNamesTheTensorAndTheOffset) {
  Upload upload;
  ASSERT_TRUE(upload.assembler.Add(Chunk(v1::Q, 0, "0123456789")).ok());
  ASSERT_TRUE(upload.assembler.Add(Chunk(v1::K, 0, "012")).ok());
  EXPECT_EQ(std::string(upload.assembler.Finish().message()),
            "tensor K: the upload ended at offset 3 of 6 bytes");
}

}  // namespace
}  // namespace pbs::server
