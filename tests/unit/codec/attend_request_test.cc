// Spec: server/codec/attend_request.h.
#include "server/codec/attend_request.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <vector>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

AttendLimits Limits() {
  AttendLimits limits;
  limits.tokens_max = 4096;
  return limits;
}

void Announce(v1::AttendHeader& header, v1::TensorName tensor, v1::DType dtype,
              std::initializer_list<int64_t> shape) {
  v1::TensorSpec& spec = *header.add_tensors();
  spec.set_tensor(tensor);
  spec.set_dtype(dtype);
  for (int64_t axis : shape) spec.add_shape(axis);
}

// Two sequences of 300 queries and 400 keys, 4 heads over 2.
v1::AttendHeader DenseBatch() {
  v1::AttendHeader header;
  Announce(header, v1::Q, v1::BF16, {2, 4, 300, 64});
  Announce(header, v1::K, v1::BF16, {2, 2, 400, 64});
  Announce(header, v1::V, v1::BF16, {2, 2, 400, 64});
  return header;
}

// Sequences of 100 and 600 tokens.
v1::AttendHeader Packed() {
  v1::AttendHeader header;
  Announce(header, v1::Q, v1::F32, {4, 700, 64});
  Announce(header, v1::K, v1::F32, {2, 700, 64});
  Announce(header, v1::V, v1::F32, {2, 700, 64});
  for (int32_t end : {0, 100, 700}) header.add_cu_seqlens(end);
  return header;
}

v1::AttendHeader Synthetic() {
  v1::AttendHeader header;
  v1::SyntheticSpec& spec = *header.mutable_synthetic();
  spec.set_batch(2);
  spec.set_num_heads(4);
  spec.set_num_kv_heads(2);
  spec.set_seq_len(300);
  spec.set_head_dim(64);
  spec.set_dtype(v1::F16);
  spec.set_seed(7);
  return header;
}

TEST(DecodeAttendSpec, ReadsADenseBatch) {
  const auto spec = DecodeAttendHeader(DenseBatch(), Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->problem.dtype, DType::kBF16);
  EXPECT_EQ(spec->problem.shape.num_heads, 4);
  EXPECT_EQ(spec->problem.shape.num_kv_heads, 2);
  ASSERT_EQ(spec->problem.shape.sequences.size(), 2u);
  EXPECT_EQ(spec->problem.shape.sequences[1].q_len, 300);
  EXPECT_EQ(spec->problem.shape.sequences[1].k_len, 400);
  EXPECT_EQ(spec->q_layout.Offset(1, 0, 3, 2), ((4 + 3) * 300 + 2) * 64);
  EXPECT_EQ(spec->kv_layout.Offset(1, 0, 1, 2), ((2 + 1) * 400 + 2) * 64);
  EXPECT_EQ(spec->lse_layout.Offset(1, 0, 3, 2), (4 + 3) * 300 + 2);
  EXPECT_EQ(spec->uploads, (std::vector<UploadSpec>{{v1::Q, 2 * 4 * 300 * 64 * 2},
                                                    {v1::K, 2 * 2 * 400 * 64 * 2},
                                                    {v1::V, 2 * 2 * 400 * 64 * 2}}));
  EXPECT_TRUE(spec->want_o);
  EXPECT_FALSE(spec->wanted.lse || spec->wanted.order || spec->wanted.lists);
  EXPECT_EQ(spec->repetitions, 1);
  EXPECT_FALSE(spec->problem.options.dense_fallback);
}

TEST(DecodeAttendSpec, WithoutAMethodItRunsPbsWithItsDefaults) {
  v1::AttendHeader header = DenseBatch();
  header.clear_options();
  const auto spec = DecodeAttendHeader(header, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->problem.options, DefaultOptions(Method::kPbs));
}

TEST(DecodeAttendSpec, ReadsPackedSequences) {
  v1::AttendHeader header = Packed();
  header.add_want(v1::LSE);
  header.add_want(v1::LIST_INDICES);
  const auto spec = DecodeAttendHeader(header, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_TRUE(spec->packed);
  ASSERT_EQ(spec->problem.shape.sequences.size(), 2u);
  EXPECT_EQ(spec->problem.shape.sequences[0].q_len, 100);
  EXPECT_EQ(spec->problem.shape.sequences[1].k_len, 600);
  EXPECT_EQ(spec->q_layout.Offset(1, 100, 2, 5), 2 * 700 * 64 + 105 * 64);
  EXPECT_FALSE(spec->want_o);
  EXPECT_TRUE(spec->wanted.lse);
  EXPECT_TRUE(spec->wanted.lists);
}

TEST(DecodeAttendSpec, PackedKeysMayHaveLengthsOfTheirOwn) {
  v1::AttendHeader header = Packed();
  header.mutable_tensors(1)->set_shape(1, 900);
  header.mutable_tensors(2)->set_shape(1, 900);
  for (int32_t end : {0, 300, 900}) header.add_cu_seqlens_k(end);
  const auto spec = DecodeAttendHeader(header, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->problem.shape.sequences[0].k_len, 300);
  EXPECT_EQ(spec->problem.shape.sequences[1].q_len, 600);
}

TEST(DecodeAttendSpec, ReadsASyntheticProblemWithoutUploads) {
  v1::AttendHeader header = Synthetic();
  header.set_warmup(3);
  header.set_repetitions(1000);
  const auto spec = DecodeAttendHeader(header, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_TRUE(spec->uploads.empty());
  EXPECT_EQ(spec->generator->seed, 7u);
  EXPECT_EQ(spec->problem.shape.sequences.size(), 2u);
  EXPECT_EQ(spec->problem.dtype, DType::kF16);
  EXPECT_EQ(spec->warmup, 3);
  EXPECT_EQ(spec->repetitions, 1000);
}

int64_t UploadBytes(const AttendSpec& spec, v1::TensorName tensor) {
  for (const UploadSpec& upload : spec.uploads) {
    if (upload.tensor == tensor) return upload.bytes;
  }
  return 0;
}

TEST(DecodeAttendSpec, OrderAndListsAreUploadsLikeOthers) {
  v1::AttendHeader header = Packed();
  header.mutable_options()->mutable_pbs()->set_use_given_order(true);
  header.mutable_options()->mutable_pbs()->set_use_given_lists(true);
  Announce(header, v1::ORDER, v1::I32, {2, 700});
  Announce(header, v1::LIST_OFFSETS, v1::I64, {4 * (1 + 5) + 1});
  Announce(header, v1::LIST_INDICES, v1::U16, {40});
  const auto spec = DecodeAttendHeader(header, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(UploadBytes(*spec, v1::ORDER), 2 * 700 * 4);
  EXPECT_EQ(UploadBytes(*spec, v1::LIST_OFFSETS), 25 * 8);
  EXPECT_EQ(UploadBytes(*spec, v1::LIST_INDICES), 80);
}

TEST(DecodeAttendSpec, EmptySequencesAndNoQueriesAreFine) {
  v1::AttendHeader header;
  Announce(header, v1::Q, v1::F32, {2, 0, 32});
  Announce(header, v1::K, v1::F32, {1, 5, 32});
  Announce(header, v1::V, v1::F32, {1, 5, 32});
  for (int32_t end : {0, 0, 0}) header.add_cu_seqlens(end);
  for (int32_t end : {0, 5, 5}) header.add_cu_seqlens_k(end);
  EXPECT_TRUE(DecodeAttendHeader(header, Limits()).ok());
}

struct RefusedCase {
  const char* name;
  v1::AttendHeader (*make)();
  std::function<void(v1::AttendHeader&)> change;
  const char* message;
};

class RefusedAttendSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedAttendSpec, NamesFieldValueAndLimit) {
  v1::AttendHeader header = GetParam().make();
  GetParam().change(header);
  const auto spec = DecodeAttendHeader(header, Limits());
  EXPECT_EQ(std::string(spec.status().message()), GetParam().message);
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(
    Tensors, RefusedAttendSpec,
    testing::Values(
        RefusedCase{"missing", DenseBatch,
                    [](auto& h) { h.mutable_tensors()->RemoveLast(); },
                    "tensor V is missing in the header"},
        RefusedCase{"nothing", DenseBatch, [](auto& h) { h.clear_tensors(); },
                    "tensor Q is missing in the header"},
        RefusedCase{"twice", DenseBatch,
                    [](auto& h) {
                      Announce(h, v1::Q, v1::BF16, {2, 4, 300, 64});
                    },
                    "tensor Q is announced more than once"},
        RefusedCase{"a_result", DenseBatch,
                    [](auto& h) {
                      Announce(h, v1::O, v1::BF16, {2, 4, 300, 64});
                    },
                    "tensor O cannot be uploaded; only Q, K, V, ORDER, LIST_OFFSETS, "
                    "LIST_INDICES can"},
        RefusedCase{"unknown", DenseBatch,
                    [](auto& h) {
                      Announce(h, static_cast<v1::TensorName>(99), v1::BF16, {1});
                    },
                    "tensor TensorName 99 cannot be uploaded; only Q, K, V, ORDER, "
                    "LIST_OFFSETS, LIST_INDICES can"},
        RefusedCase{"dtype_of_no_element", DenseBatch,
                    [](auto& h) { h.mutable_tensors(0)->set_dtype(v1::I64); },
                    "dtype of tensor Q I64 is not one of F32, F16, BF16"},
        RefusedCase{"dtype_unknown", DenseBatch,
                    [](auto& h) {
                      h.mutable_tensors(0)->set_dtype(static_cast<v1::DType>(77));
                    },
                    "dtype of tensor Q 77 is not one of F32, F16, BF16"},
        RefusedCase{"dtypes_differ", DenseBatch,
                    [](auto& h) { h.mutable_tensors(2)->set_dtype(v1::F16); },
                    "dtype of tensor V F16 is not BF16"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Shapes, RefusedAttendSpec,
    testing::Values(
        RefusedCase{"rank_of_a_batch", Packed, [](auto& h) { h.clear_cu_seqlens(); },
                    "rank of tensor Q 3 is not 4 without cu_seqlens"},
        RefusedCase{"rank_of_packed", DenseBatch,
                    [](auto& h) {
                      h.add_cu_seqlens(0);
                      h.add_cu_seqlens(300);
                    },
                    "rank of tensor Q 4 is not 3 with cu_seqlens"},
        RefusedCase{"batch_zero", DenseBatch,
                    [](auto& h) { h.mutable_tensors(0)->set_shape(0, 0); },
                    "batch of tensor Q 0 is outside [1, 65536]"},
        RefusedCase{"negative_length", DenseBatch,
                    [](auto& h) { h.mutable_tensors(0)->set_shape(2, -1); },
                    "length of tensor Q -1 is outside [0, 1048576]"},
        RefusedCase{"overflowing_length", DenseBatch,
                    [](auto& h) { h.mutable_tensors(1)->set_shape(2, INT64_MAX); },
                    "length of tensor K 9223372036854775807 is outside [0, 1048576]"},
        RefusedCase{"batches_differ", DenseBatch,
                    [](auto& h) { h.mutable_tensors(1)->set_shape(0, 3); },
                    "shape of tensor K [3, 2, 400, 64] is not [2, 2, 400, 64]"},
        RefusedCase{"k_and_v_differ", DenseBatch,
                    [](auto& h) { h.mutable_tensors(2)->set_shape(2, 401); },
                    "shape of tensor V [2, 2, 401, 64] is not [2, 2, 400, 64]"},
        // Without the shape: a client chooses how long that is.
        RefusedCase{
            "rank_of_v", DenseBatch,
            [](auto& h) { h.mutable_tensors(2)->mutable_shape()->Resize(100'000, 1); },
            "rank of tensor V 100000 is not 4"},
        RefusedCase{"widths_differ", DenseBatch,
                    [](auto& h) { h.mutable_tensors(0)->set_shape(3, 128); },
                    "shape of tensor K [2, 2, 400, 64] is not [2, 2, 400, 128]"},
        RefusedCase{"head_dim", Synthetic,
                    [](auto& h) { h.mutable_synthetic()->set_head_dim(80); },
                    "head_dim 80 is not one of 32, 64, 96, 128, 256"},
        RefusedCase{"gqa", DenseBatch,
                    [](auto& h) {
                      h.mutable_tensors(1)->set_shape(1, 3);
                      h.mutable_tensors(2)->set_shape(1, 3);
                    },
                    "num_heads 4 is not a multiple of num_kv_heads 3"},
        RefusedCase{"more_queries_than_keys", DenseBatch,
                    [](auto& h) { h.mutable_tensors(0)->set_shape(2, 401); },
                    "q_len of sequence 0 401 is outside [0, 400]"},
        RefusedCase{"past_the_servers_limit", Synthetic,
                    [](auto& h) { h.mutable_synthetic()->set_seq_len(4097); },
                    "k_len of sequence 0 4097 exceeds attend_tokens_max 4096"},
        RefusedCase{"batch_past_the_limit", Synthetic,
                    [](auto& h) {
                      h.mutable_synthetic()->set_batch(65536);
                      h.mutable_synthetic()->set_seq_len(4096);
                    },
                    "total k_len of the batch 268435456 is outside [0, 16777216]"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Lengths, RefusedAttendSpec,
    testing::Values(
        RefusedCase{"first_not_0", Packed, [](auto& h) { h.set_cu_seqlens(0, 1); },
                    "cu_seqlens[0] 1 is not 0"},
        RefusedCase{"falling", Packed, [](auto& h) { h.set_cu_seqlens(1, 701); },
                    "cu_seqlens[2] 700 falls below cu_seqlens[1] 701"},
        RefusedCase{"negative", Packed, [](auto& h) { h.set_cu_seqlens(1, -5); },
                    "cu_seqlens[1] -5 falls below cu_seqlens[0] 0"},
        RefusedCase{"last_not_the_total", Packed,
                    [](auto& h) { h.set_cu_seqlens(2, 699); },
                    "last of cu_seqlens 699 is not the tensor's length 700"},
        RefusedCase{"only_one", Packed,
                    [](auto& h) {
                      h.clear_cu_seqlens();
                      h.add_cu_seqlens(0);
                    },
                    "number of cu_seqlens 1 is outside [2, 65537]"},
        RefusedCase{"keys_without_queries", DenseBatch,
                    [](auto& h) { h.add_cu_seqlens_k(0); },
                    "cu_seqlens_k needs cu_seqlens"},
        RefusedCase{"keys_of_another_batch", Packed,
                    [](auto& h) {
                      h.add_cu_seqlens_k(0);
                      h.add_cu_seqlens_k(700);
                    },
                    "number of cu_seqlens_k 2 is not the number of cu_seqlens 3"},
        RefusedCase{"keys_last_not_the_total", Packed,
                    [](auto& h) {
                      for (int32_t end : {0, 100, 600}) h.add_cu_seqlens_k(end);
                    },
                    "last of cu_seqlens_k 600 is not the tensor's length 700"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    OrderAndLists, RefusedAttendSpec,
    testing::Values(
        RefusedCase{"order_not_used", DenseBatch,
                    [](auto& h) {
                      Announce(h, v1::ORDER, v1::I32, {2, 2, 400});
                    },
                    "tensor ORDER needs use_given_order"},
        RefusedCase{"order_missing", DenseBatch,
                    [](auto& h) {
                      h.mutable_options()->mutable_pbs()->set_use_given_order(true);
                    },
                    "use_given_order needs tensor ORDER"},
        RefusedCase{"order_dtype", DenseBatch,
                    [](auto& h) {
                      h.mutable_options()->mutable_pbs()->set_use_given_order(true);
                      Announce(h, v1::ORDER, v1::I64, {2, 2, 400});
                    },
                    "dtype of tensor ORDER I64 is not I32"},
        RefusedCase{"order_of_the_other_scope", DenseBatch,
                    [](auto& h) {
                      h.mutable_options()->mutable_pbs()->set_use_given_order(true);
                      h.mutable_options()->mutable_pbs()->set_scope(v1::QUERY_HEAD);
                      Announce(h, v1::ORDER, v1::I32, {2, 2, 400});
                    },
                    "shape of tensor ORDER [2, 2, 400] is not [2, 4, 400]"},
        RefusedCase{"order_rank", DenseBatch,
                    [](auto& h) {
                      h.mutable_options()->mutable_pbs()->set_use_given_order(true);
                      Announce(h, v1::ORDER, v1::I32, {2, 2, 400, 1});
                    },
                    "rank of tensor ORDER 4 is not 3"},
        RefusedCase{"indices_missing", DenseBatch,
                    [](auto& h) {
                      h.mutable_options()->mutable_pbs()->set_use_given_lists(true);
                      Announce(h, v1::LIST_OFFSETS, v1::I64, {33});
                    },
                    "use_given_lists needs tensor LIST_INDICES"},
        RefusedCase{"offsets_shape", DenseBatch,
                    [](auto& h) {
                      h.mutable_options()->mutable_pbs()->set_use_given_lists(true);
                      Announce(h, v1::LIST_OFFSETS, v1::I64, {25});
                      Announce(h, v1::LIST_INDICES, v1::U16, {5});
                    },
                    "shape of tensor LIST_OFFSETS [25] is not [33]"},
        RefusedCase{"more_indices_than_blocks", DenseBatch,
                    [](auto& h) {
                      h.mutable_options()->mutable_pbs()->set_use_given_lists(true);
                      Announce(h, v1::LIST_OFFSETS, v1::I64, {33});
                      Announce(h, v1::LIST_INDICES, v1::U16, {97});
                    },
                    "length of tensor LIST_INDICES 97 is outside [0, 96]"},
        RefusedCase{"indices_rank", DenseBatch,
                    [](auto& h) {
                      h.mutable_options()->mutable_pbs()->set_use_given_lists(true);
                      Announce(h, v1::LIST_OFFSETS, v1::I64, {33});
                      Announce(h, v1::LIST_INDICES, v1::U16, {5, 5});
                    },
                    "rank of tensor LIST_INDICES 2 is not 1"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Options, RefusedAttendSpec,
    testing::Values(
        RefusedCase{"request_id", DenseBatch,
                    [](auto& h) { h.set_request_id(std::string(129, 'x')); },
                    "request_id has 129 bytes, more than 128"},
        RefusedCase{"warmup", DenseBatch, [](auto& h) { h.set_warmup(101); },
                    "warmup 101 is outside [0, 100]"},
        RefusedCase{"repetitions", DenseBatch, [](auto& h) { h.set_repetitions(1001); },
                    "repetitions 1001 is outside [0, 1000]"},
        RefusedCase{
            "want_an_input", DenseBatch, [](auto& h) { h.add_want(v1::K); },
            "want[0] K is not a result; results are O, LSE, ORDER, LIST_OFFSETS, "
            "LIST_INDICES"},
        RefusedCase{"non_finite_with_pbs", DenseBatch,
                    [](auto& h) { h.set_allow_non_finite(true); },
                    "allow_non_finite needs method dense, not pbs"},
        RefusedCase{"synthetic_with_upload", DenseBatch,
                    [](auto& h) { *h.mutable_synthetic() = Synthetic().synthetic(); },
                    "tensor Q and synthetic exclude each other"},
        RefusedCase{"synthetic_packed", Synthetic, [](auto& h) { h.add_cu_seqlens(0); },
                    "cu_seqlens and synthetic exclude each other"},
        RefusedCase{"synthetic_batch", Synthetic,
                    [](auto& h) { h.mutable_synthetic()->set_batch(0); },
                    "synthetic.batch 0 is outside [1, 65536]"},
        RefusedCase{"synthetic_dtype", Synthetic,
                    [](auto& h) { h.mutable_synthetic()->clear_dtype(); },
                    "synthetic.dtype DTYPE_UNSPECIFIED is not one of F32, F16, BF16"},
        RefusedCase{
            "block_size", DenseBatch,
            [](auto& h) { h.mutable_options()->mutable_dense()->set_block_size(100); },
            "block_size 100 is not a power of two in [16, 256]"}),
    testing_support::CaseName());

struct ListsCase {
  const char* name;
  std::vector<int64_t> offsets;
  const char* message;  // "" when accepted; there are 4 indices
};

class DecodeListsSpec : public testing::TestWithParam<ListsCase> {};

TEST_P(DecodeListsSpec, AcceptsRisingOffsetsThatCoverTheIndices) {
  const std::vector<uint16_t> indices = {0, 1, 0, 1};
  const auto lists = DecodeBlockLists(GetParam().offsets, indices);
  EXPECT_EQ(std::string(lists.status().message()), GetParam().message);
  if (!lists.ok()) return;
  EXPECT_EQ(lists->indices, indices);
  for (size_t row = 0; row < lists->count.size(); ++row) {
    EXPECT_EQ(lists->begin[row] + lists->count[row], GetParam().offsets[row + 1]);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, DecodeListsSpec,
    testing::Values(
        ListsCase{"good", {0, 1, 1, 4}, ""},
        ListsCase{"first_not_0", {1, 4}, "LIST_OFFSETS[0] 1 is not 0"},
        ListsCase{
            "falling", {0, 3, 2, 4}, "LIST_OFFSETS[2] 2 falls below LIST_OFFSETS[1] 3"},
        ListsCase{"negative",
                  {0, INT64_MIN, 4},
                  "LIST_OFFSETS[1] -9223372036854775808 falls below LIST_OFFSETS[0] 0"},
        ListsCase{"huge_row",
                  {0, INT64_MAX},
                  "block list 0 has 9223372036854775807 entries, more than 65535"},
        ListsCase{"too_few_indices",
                  {0, 5},
                  "last of LIST_OFFSETS 5 is not the length of LIST_INDICES 4"},
        ListsCase{"too_many_indices",
                  {0, 3},
                  "last of LIST_OFFSETS 3 is not the length of LIST_INDICES 4"}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
