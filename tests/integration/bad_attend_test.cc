// Spec: docs/PROTOCOL.md "Errors", for what Attend is sent.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/integration/bad_input.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using grpc::StatusCode;

class BadAttendSpec : public testing::TestWithParam<BadInputCase> {};

TEST_P(BadAttendSpec, IsRefusedExactlyAndLeavesNothingBehind) {
  ExpectRefused(GetParam());
}

void Announce(v1::AttendHeader& header, v1::TensorName tensor, v1::DType dtype,
              std::initializer_list<int64_t> shape) {
  v1::TensorSpec& spec = *header.add_tensors();
  spec.set_tensor(tensor);
  spec.set_dtype(dtype);
  for (int64_t axis : shape) spec.add_shape(axis);
}

// q, k, v of 40 tokens, 2 heads, width 32, f32: 10,240 bytes each.
v1::AttendRequest GoodHeader() {
  v1::AttendRequest request;
  for (v1::TensorName tensor : {v1::Q, v1::K, v1::V}) {
    Announce(*request.mutable_header(), tensor, v1::F32, {1, 2, 40, 32});
  }
  return request;
}
v1::AttendRequest Chunk(v1::TensorName tensor, uint64_t offset, std::string data) {
  v1::AttendRequest request;
  request.mutable_chunk()->set_tensor(tensor);
  request.mutable_chunk()->set_offset(offset);
  request.mutable_chunk()->set_data(std::move(data));
  return request;
}
std::string Zeros(size_t bytes) { return std::string(bytes, '\0'); }
std::string Floats(std::vector<float> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

BadInputCase BadHeader(const char* name, std::function<void(v1::AttendHeader&)> change,
                       const char* message,
                       StatusCode code = StatusCode::INVALID_ARGUMENT) {
  return {name,
          [change](BadInputNode& node) {
            v1::AttendRequest request = GoodHeader();
            change(*request.mutable_header());
            return node.Attend({request});
          },
          code, message};
}

BadInputCase BadUpload(const char* name, std::vector<v1::AttendRequest> messages,
                       const char* message) {
  return {name, [messages](BadInputNode& node) { return node.Attend(messages); },
          StatusCode::INVALID_ARGUMENT, message};
}

INSTANTIATE_TEST_SUITE_P(
    Header, BadAttendSpec,
    testing::Values(
        BadHeader(
            "no_tensors", [](auto& h) { h.clear_tensors(); },
            "tensor Q is missing in the header"),
        BadHeader(
            "tensor_twice",
            [](auto& h) {
              Announce(h, v1::K, v1::F32, {1, 2, 40, 32});
            },
            "tensor K is announced more than once"),
        BadHeader(
            "rank", [](auto& h) { h.mutable_tensors(0)->add_shape(1); },
            "rank of tensor Q 5 is not 4 without cu_seqlens"),
        BadHeader(
            "rank_of_v",
            [](auto& h) { h.mutable_tensors(2)->mutable_shape()->Resize(100'000, 1); },
            "rank of tensor V 100000 is not 4"),
        BadHeader(
            "negative_axis", [](auto& h) { h.mutable_tensors(0)->set_shape(0, -1); },
            "batch of tensor Q -1 is outside [1, 65536]"),
        BadHeader(
            "overflowing_axis",
            [](auto& h) { h.mutable_tensors(2)->set_shape(2, INT64_MAX); },
            "shape of tensor V [1, 2, 9223372036854775807, 32] is not [1, 2, 40, "
            "32]"),
        BadHeader(
            "dtype", [](auto& h) { h.mutable_tensors(1)->set_dtype(v1::F16); },
            "dtype of tensor K F16 is not F32"),
        BadHeader(
            "head_dim",
            [](auto& h) {
              for (int i = 0; i < 3; ++i) h.mutable_tensors(i)->set_shape(3, 48);
            },
            "head_dim 48 is not one of 32, 64, 96, 128, 256"),
        BadHeader(
            "gqa",
            [](auto& h) {
              for (int i = 1; i < 3; ++i) h.mutable_tensors(i)->set_shape(1, 3);
            },
            "num_kv_heads 3 is outside [1, 2]"),
        BadHeader(
            "more_queries_than_keys",
            [](auto& h) { h.mutable_tensors(0)->set_shape(2, 41); },
            "q_len of sequence 0 41 is outside [0, 40]"),
        BadHeader(
            "too_many_keys",
            [](auto& h) {
              for (int i = 0; i < 3; ++i) h.mutable_tensors(i)->set_shape(2, 4097);
            },
            "k_len of sequence 0 4097 exceeds attend_tokens_max 4096"),
        BadHeader(
            "more_than_the_budget_ever_has",
            [](auto& h) {
              for (int i = 0; i < 3; ++i) {
                h.mutable_tensors(i)->set_shape(0, 16);
                h.mutable_tensors(i)->set_shape(1, 64);
                h.mutable_tensors(i)->set_shape(2, 4096);
              }
              h.mutable_options()->mutable_dense();
            },
            "... bytes of memory, more than memory_bytes_max 67108864"),
        BadHeader(
            "cu_seqlens_rank",
            [](auto& h) {
              h.add_cu_seqlens(0);
              h.add_cu_seqlens(40);
            },
            "rank of tensor Q 4 is not 3 with cu_seqlens"),
        BadHeader(
            "cu_seqlens_k_alone", [](auto& h) { h.add_cu_seqlens_k(0); },
            "cu_seqlens_k needs cu_seqlens"),
        BadHeader(
            "order_that_is_not_used",
            [](auto& h) {
              Announce(h, v1::ORDER, v1::I32, {1, 2, 40});
            },
            "tensor ORDER needs use_given_order"),
        BadHeader(
            "want_an_input", [](auto& h) { h.add_want(v1::Q); },
            "want[0] Q is not a result; results are O, LSE, ORDER, LIST_OFFSETS, "
            "LIST_INDICES"),
        BadHeader(
            "repetitions", [](auto& h) { h.set_repetitions(-1); },
            "repetitions -1 is outside [0, 1000]"),
        BadHeader(
            "non_finite_with_pbs", [](auto& h) { h.set_allow_non_finite(true); },
            "allow_non_finite needs method dense, not pbs"),
        BadHeader(
            "stride",
            [](auto& h) { h.mutable_options()->mutable_xattention()->set_stride(3); },
            "stride 3 is not a power of two in [2, 64] of at most block_size 128"),
        BadHeader(
            "option_of_another_method",
            [](auto& h) {
              h.mutable_options()->mutable_dense();
              h.mutable_options()->set_sink_blocks(1);
            },
            "method dense has no option sink_blocks=1; pbs, mean_pooling, xattention, "
            "minference, flexprefill, prism, flashprefill have it"),
        BadHeader(
            "synthetic_with_tensors",
            [](auto& h) { h.mutable_synthetic()->set_batch(1); },
            "tensor Q and synthetic exclude each other")),
    testing_support::CaseName());

v1::AttendRequest HeaderWithOrder(v1::Scope scope) {
  v1::AttendRequest request = GoodHeader();
  v1::PbsOptions& options = *request.mutable_header()->mutable_options()->mutable_pbs();
  options.set_block_size(16);
  options.set_segment_size(32);
  options.set_scope(scope);
  options.set_use_given_order(true);
  Announce(*request.mutable_header(), v1::ORDER, v1::I32, {1, 2, 40});
  return request;
}
v1::AttendRequest HeaderWithLists() {
  v1::AttendRequest request = GoodHeader();
  v1::MeanPoolingOptions& options =
      *request.mutable_header()->mutable_options()->mutable_mean_pooling();
  options.set_block_size(16);
  options.set_use_given_lists(true);
  Announce(*request.mutable_header(), v1::LIST_OFFSETS, v1::I64, {7});
  Announce(*request.mutable_header(), v1::LIST_INDICES, v1::U16, {6});
  return request;
}
template <class T>
std::string Bytes(std::vector<T> values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}
// Both heads keep their keys in place, but for two swapped across a segment's end.
std::string CrossingOrder() {
  std::vector<int32_t> order(80);
  for (int32_t i = 0; i < 80; ++i) order[i] = i % 40;
  std::swap(order[31], order[32]);
  return Bytes(order);
}

std::vector<v1::AttendRequest> WithQkv(v1::AttendRequest header,
                                       std::vector<v1::AttendRequest> more) {
  std::vector<v1::AttendRequest> messages = {std::move(header)};
  for (v1::TensorName tensor : {v1::Q, v1::K, v1::V}) {
    messages.push_back(Chunk(tensor, 0, Zeros(10'240)));
  }
  messages.insert(messages.end(), more.begin(), more.end());
  return messages;
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

INSTANTIATE_TEST_SUITE_P(
    Upload, BadAttendSpec,
    testing::Values(
        BadUpload("chunk_before_the_header", {Chunk(v1::Q, 0, "abcd")},
                  "chunk of tensor Q before the header"),
        BadUpload("nothing", {}, "the call ended before its header"),
        BadUpload("empty_message", {v1::AttendRequest()},
                  "a message is neither a header nor a chunk"),
        BadUpload("second_header", {GoodHeader(), GoodHeader()},
                  "a second header in one call"),
        BadUpload(
            "gap", {GoodHeader(), Chunk(v1::K, 4, "abcd")},
            "tensor K: chunk of 4 bytes at offset 4 leaves a gap; expected offset 0 "
            "of 10240 bytes"),
        BadUpload(
            "duplicate",
            {GoodHeader(), Chunk(v1::K, 0, Zeros(8)), Chunk(v1::K, 0, Zeros(8))},
            "tensor K: chunk of 8 bytes at offset 0 repeats bytes; expected offset "
            "8 of 10240 bytes"),
        BadUpload("past_the_end", {GoodHeader(), Chunk(v1::V, 0, Zeros(10'241))},
                  "tensor V: chunk of 10241 bytes at offset 0 ends past the tensor; "
                  "expected offset 0 of 10240 bytes"),
        BadUpload(
            "empty_chunk", {GoodHeader(), Chunk(v1::V, 0, "")},
            "tensor V: chunk of 0 bytes at offset 0 is empty; expected offset 0 of "
            "10240 bytes"),
        BadUpload("offset_overflow", {GoodHeader(), Chunk(v1::Q, UINT64_MAX, "ab")},
                  "tensor Q: chunk of 2 bytes at offset 18446744073709551615 leaves a "
                  "gap; expected offset 0 of 10240 bytes"),
        BadUpload("tensor_not_announced", {GoodHeader(), Chunk(v1::ORDER, 0, "abcd")},
                  "chunk of tensor ORDER, which the header does not announce"),
        BadUpload("upload_ends_early",
                  {GoodHeader(), Chunk(v1::Q, 0, Zeros(10'240)),
                   Chunk(v1::K, 0, Zeros(100))},
                  "tensor K: the upload ended at offset 100 of 10240 bytes"),
        BadUpload("nan", {GoodHeader(), Chunk(v1::K, 0, Floats({0, 1, kNan}))},
                  "tensor K element 2 is NaN or infinite"),
        BadUpload("infinity_in_a_later_chunk",
                  {GoodHeader(), Chunk(v1::V, 0, Zeros(10)),
                   Chunk(v1::V, 10, Zeros(6) + Floats({-kInfinity}))},
                  "tensor V element 4 is NaN or infinite"),
        BadUpload("element_cut_by_chunks",
                  {GoodHeader(), Chunk(v1::Q, 0, Floats({kNan}).substr(0, 3)),
                   Chunk(v1::Q, 3, Floats({kNan}).substr(3))},
                  "tensor Q element 0 is NaN or infinite"),
        BadUpload(
            "order_crosses_a_segment",
            WithQkv(HeaderWithOrder(v1::QUERY_HEAD),
                    {Chunk(v1::ORDER, 0, CrossingOrder())}),
            "order of sequence 0, head 0 holds 32 in slot 31; it must be a "
            "permutation inside each segment of 32 keys and leave the keys behind "
            "the last one in place"),
        BadUpload(
            "order_is_no_permutation",
            WithQkv(HeaderWithOrder(v1::KV_HEAD),
                    {Chunk(v1::ORDER, 0, Bytes(std::vector<int32_t>(80)))}),
            "order of sequence 0, head 0 holds 0 in slot 1; it must be a "
            "permutation inside each segment of 32 keys and leave the keys behind "
            "the last one in place"),
        BadUpload("lists_fall",
                  WithQkv(HeaderWithLists(),
                          {Chunk(v1::LIST_OFFSETS, 0,
                                 Bytes(std::vector<int64_t>{0, 1, 0, 3, 4, 5, 6})),
                           Chunk(v1::LIST_INDICES, 0, Zeros(12))}),
                  "LIST_OFFSETS[2] 0 falls below LIST_OFFSETS[1] 1"),
        BadUpload("list_index_past_its_segment",
                  WithQkv(HeaderWithLists(),
                          {Chunk(v1::LIST_OFFSETS, 0,
                                 Bytes(std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6})),
                           Chunk(v1::LIST_INDICES, 0,
                                 Bytes(std::vector<uint16_t>{1, 1, 2, 0, 1, 2}))}),
                  "block list of sequence 0, head 0, query block 0 holds block 1; only "
                  "blocks below 1 (the end of its own segment) can be read"),
        BadUpload(
            "list_misses_its_own_block",
            WithQkv(HeaderWithLists(),
                    {Chunk(v1::LIST_OFFSETS, 0,
                           Bytes(std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6})),
                     Chunk(v1::LIST_INDICES, 0,
                           Bytes(std::vector<uint16_t>{0, 0, 2, 0, 1, 2}))}),
            "block list of sequence 0, head 0, query block 1 misses block 1 of its "
            "own segment, and no order says where its queries' own keys lie")),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
