// Spec: docs/PROTOCOL.md "Errors". Whatever is sent, the answer has the right code, the
// value and the limit; the server stays healthy and holds nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "client/cpp/raw_stream.h"
#include "pbs/v1/attention.grpc.pb.h"
#include "pbs/v1/kv.grpc.pb.h"
#include "pbs/v1/prefill.grpc.pb.h"
#include "proto/wire/messages.h"
#include "tests/integration/test_node.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using grpc::StatusCode;

// One node for all cases: what one leaves behind the next would see.
class BadInputNode {
 public:
  static BadInputNode& Get() {
    static BadInputNode node;
    return node;
  }

  // Sends `messages` to a method and returns its end. Refused writes are no failure:
  // the server may answer before it has everything.
  grpc::Status Call(const std::string& method,
                    const std::vector<grpc::ByteBuffer>& messages) {
    client::RawStream stream(channel_, method, {});
    bool open = true;
    for (const grpc::ByteBuffer& message : messages) {
      open = open && stream.Write(message);
    }
    if (open) stream.WritesDone();
    grpc::ByteBuffer reply;
    while (stream.Read(&reply)) {
    }
    const absl::Status status = stream.Finish();
    return {static_cast<StatusCode>(status.code()), std::string(status.message())};
  }
  grpc::Status Prefill(const std::function<void(v1::PrefillRequest&)>& change) {
    v1::PrefillRequest request = PrefillOf(50);
    change(request);
    return Call("/pbs.v1.Prefill/Prefill", {wire::EncodeMessage(request)});
  }
  grpc::Status Attend(const std::vector<v1::AttendRequest>& messages) {
    std::vector<grpc::ByteBuffer> encoded;
    for (const auto& message : messages)
      encoded.push_back(wire::EncodeMessage(message));
    return Call("/pbs.v1.Attention/Attend", encoded);
  }
  grpc::Status Fetch(const std::function<void(v1::FetchRequest&)>& change) {
    v1::FetchRequest request;
    *request.mutable_ticket() = lease_;
    change(request);
    return Call("/pbs.v1.KvSource/Fetch", {wire::EncodeMessage(request)});
  }
  grpc::Status Ticket(const std::string& method, const v1::KvTicket& ticket) {
    if (method == "Describe") {
      return Call("/pbs.v1.KvSource/Describe", {wire::EncodeMessage(ticket)});
    }
    v1::ReleaseRequest request;  // RenewRequest's first field is the same
    *request.mutable_ticket() = ticket;
    return Call("/pbs.v1.KvSource/" + method, {wire::EncodeMessage(request)});
  }

  const v1::KvTicket& lease() const { return lease_; }
  const v1::KvTicket& released() const { return released_; }

  void ExpectHealthy() {
    EXPECT_TRUE(Eventually([&] { return node_.ledger.bytes_held() == held_; }))
        << "held " << node_.ledger.bytes_held() << " expected " << held_;
    EXPECT_TRUE(client_->GetServerInfo().ok());
    PrefillEvents events;
    EXPECT_TRUE(client_->Prefill(PrefillOf(3), events).ok());
  }

 private:
  static NodeOptions Options() {
    NodeOptions options;
    options.service.limits.attend_tokens_max = 4096;
    options.memory_bytes_max = 64 << 20;
    return options;
  }
  BadInputNode() {
    PrefillEvents events;
    lease_ = client_->Prefill(LeaseOf(40), events)->ticket();
    released_ = client_->Prefill(LeaseOf(40), events)->ticket();
    EXPECT_TRUE(client_->Release(released_).ok());
    EXPECT_TRUE(Eventually([&] { return node_.Running() == 0; }));
    held_ = node_.ledger.bytes_held();
  }

  TestNode node_{Options()};
  std::shared_ptr<grpc::Channel> channel_ = node_.NewChannel();
  std::unique_ptr<client::Client> client_ = node_.NewClient();
  v1::KvTicket lease_, released_;
  int64_t held_ = 0;  // of the one lease that lives
};

struct BadInputCase {
  const char* name;
  std::function<grpc::Status(BadInputNode&)> call;
  StatusCode code;
  const char* message;
};

class BadInputSpec : public testing::TestWithParam<BadInputCase> {};

TEST_P(BadInputSpec, IsRefusedExactlyAndLeavesNothingBehind) {
  BadInputNode& node = BadInputNode::Get();
  const grpc::Status status = GetParam().call(node);
  EXPECT_EQ(status.error_code(), GetParam().code);
  const std::string message = GetParam().message;
  if (message.starts_with("...")) {  // behind a number that the planner decides
    EXPECT_THAT(status.error_message(), testing::EndsWith(message.substr(3)));
  } else {
    EXPECT_EQ(status.error_message(), message);
  }
  node.ExpectHealthy();
}

// ---- Prefill

BadInputCase BadPrefill(const char* name,
                        std::function<void(v1::PrefillRequest&)> change,
                        const char* message,
                        StatusCode code = StatusCode::INVALID_ARGUMENT) {
  return {name, [change](BadInputNode& node) { return node.Prefill(change); }, code,
          message};
}

INSTANTIATE_TEST_SUITE_P(
    Prefill, BadInputSpec,
    testing::Values(
        BadPrefill(
            "no_tokens", [](auto& r) { r.clear_token_ids(); },
            "number of token_ids 0 is outside [1, 4096]"),
        BadPrefill(
            "too_many_tokens", [](auto& r) { r.mutable_token_ids()->Resize(4097, 1); },
            "number of token_ids 4097 is outside [1, 4096]"),
        BadPrefill(
            "token_out_of_range", [](auto& r) { r.set_token_ids(7, 128); },
            "token_ids[7] is not below vocab_size 128"),
        BadPrefill(
            "unknown_model", [](auto& r) { r.set_model("other"); },
            "no model \"other\"; this server has \"tiny\"", StatusCode::NOT_FOUND),
        BadPrefill(
            "model_name_with_control_bytes",
            [](auto& r) { r.set_model(std::string("a\n\0b", 4)); },
            "no model \"a\\n\\x00\\x62\"; this server has \"tiny\"",
            StatusCode::NOT_FOUND),
        BadPrefill(
            "request_id_too_long",
            [](auto& r) { r.set_request_id(std::string(129, 'r')); },
            "request_id has 129 bytes, more than 128"),
        BadPrefill(
            "tenant_salt_too_long",
            [](auto& r) { r.set_tenant_salt(std::string(129, 'r')); },
            "tenant_salt has 129 bytes, more than 128"),
        BadPrefill(
            "key_without_lease", [](auto& r) { r.set_idempotency_key("k"); },
            "idempotency_key needs delivery lease: only a lease can be given "
            "twice"),
        BadPrefill(
            "threshold_0",
            [](auto& r) { r.mutable_attention()->mutable_pbs()->set_threshold(0); },
            "threshold 0.000000 is outside (0, 1]"),
        BadPrefill(
            "threshold_nan",
            [](auto& r) {
              r.mutable_attention()->mutable_mean_pooling()->set_threshold(
                  std::numeric_limits<float>::quiet_NaN());
            },
            "threshold nan is outside (0, 1]"),
        BadPrefill(
            "block_size",
            [](auto& r) { r.mutable_attention()->mutable_pbs()->set_block_size(8); },
            "block_size 8 is not a power of two in [16, 256]"),
        BadPrefill(
            "segment_not_a_multiple",
            [](auto& r) {
              r.mutable_attention()->mutable_pbs()->set_segment_size(300);
            },
            "segment_size 300 is not a multiple of block_size 128"),
        BadPrefill(
            "coverage_rows",
            [](auto& r) { r.mutable_attention()->set_coverage_rows(1025); },
            "coverage_rows 1025 is outside [0, 1024]"),
        BadPrefill(
            "given_order",
            [](auto& r) {
              r.mutable_attention()->mutable_pbs()->set_use_given_order(true);
            },
            "use_given_order true is for Attend only: a prefill brings no "
            "tensors"),
        BadPrefill(
            "minference", [](auto& r) { r.mutable_attention()->mutable_minference(); },
            "attention method minference is reserved; this server runs dense, "
            "pbs and mean_pooling",
            StatusCode::UNIMPLEMENTED),
        BadPrefill(
            "flexprefill",
            [](auto& r) { r.mutable_attention()->mutable_flexprefill(); },
            "attention method flexprefill is reserved; this server runs dense, "
            "pbs and mean_pooling",
            StatusCode::UNIMPLEMENTED),
        BadPrefill(
            "push", [](auto& r) { r.mutable_delivery()->mutable_push(); },
            "delivery push is reserved; this server delivers none, inline and "
            "lease",
            StatusCode::UNIMPLEMENTED),
        BadPrefill(
            "prefix_ticket", [](auto& r) { r.mutable_prefix_ticket(); },
            "prefix_ticket is reserved: this server reuses no prefixes yet",
            StatusCode::UNIMPLEMENTED),
        BadPrefill(
            "ttl_too_long",
            [](auto& r) {
              r.mutable_delivery()->mutable_lease()->set_ttl_seconds(601);
            },
            "ttl_seconds 601 is outside [1, 600]"),
        BadPrefill(
            "ttl_0",
            [](auto& r) { r.mutable_delivery()->mutable_lease()->set_ttl_seconds(0); },
            "ttl_seconds 0 is outside [1, 600]"),
        BadPrefill(
            "inline_chunk_too_small",
            [](auto& r) {
              r.mutable_delivery()->mutable_inline_()->set_chunk_bytes(1);
            },
            "chunk_bytes 1 is outside [65536, 4194304]"),
        BadPrefill(
            "inline_dtype",
            [](auto& r) {
              r.mutable_delivery()->mutable_inline_()->set_dtype(v1::U16);
            },
            "dtype U16 is not one of F32, F16, BF16"),
        BadPrefill(
            "top_logits", [](auto& r) { r.set_top_logits(1000); },
            "top_logits 1000 is outside [0, 100]"),
        BadPrefill(
            "logit_position",
            [](auto& r) {
              r.set_top_logits(1);
              r.add_logit_positions(50);
            },
            "logit_positions[0] 50 is not below the number of token_ids 50"),
        BadPrefill(
            "priority", [](auto& r) { r.set_priority(-101); },
            "priority -101 is outside [-100, 100]")),
    testing_support::CaseName());

// ---- Attend

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
    AttendHeader, BadInputSpec,
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
            "xattention", [](auto& h) { h.mutable_options()->mutable_xattention(); },
            "attention method xattention is reserved; this server runs dense, pbs "
            "and mean_pooling",
            StatusCode::UNIMPLEMENTED),
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
    AttendUpload, BadInputSpec,
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
            "block list of sequence 0, head 0, query block 1 misses block 1, which "
            "holds the key of position 16: every query must reach its own "
            "position")),
    testing_support::CaseName());

// ---- KvSource

BadInputCase BadFetch(const char* name, std::function<void(v1::FetchRequest&)> change,
                      const char* message,
                      StatusCode code = StatusCode::INVALID_ARGUMENT) {
  return {name, [change](BadInputNode& node) { return node.Fetch(change); }, code,
          message};
}
BadInputCase BadTicket(const char* name, const char* method,
                       std::function<v1::KvTicket(BadInputNode&)> ticket) {
  return {name, [=](BadInputNode& node) { return node.Ticket(method, ticket(node)); },
          StatusCode::NOT_FOUND,
          "no lease has this ticket: it is unknown, expired or released"};
}

v1::KvTicket Foreign(BadInputNode& node) {
  v1::KvTicket ticket = node.lease();
  ticket.set_epoch(ticket.epoch() + 1);
  return ticket;
}
v1::KvTicket Unknown(BadInputNode& node) {
  v1::KvTicket ticket = node.lease();
  ticket.set_handle("00000000000000000000000000000000");
  return ticket;
}
v1::KvTicket Released(BadInputNode& node) { return node.released(); }
v1::KvTicket Empty(BadInputNode&) { return {}; }

INSTANTIATE_TEST_SUITE_P(
    KvSource, BadInputSpec,
    testing::Values(
        BadTicket("describe_foreign", "Describe", Foreign),
        BadTicket("describe_unknown", "Describe", Unknown),
        BadTicket("describe_released", "Describe", Released),
        BadTicket("describe_empty", "Describe", Empty),
        BadTicket("renew_foreign", "Renew", Foreign),
        BadTicket("renew_released", "Renew", Released),
        BadTicket("release_unknown", "Release", Unknown),
        BadTicket("release_twice", "Release", Released),
        BadTicket("fetch_foreign", "Fetch", Foreign),
        BadTicket("fetch_released", "Fetch", Released),
        BadFetch(
            "another_models_digest",
            [](auto& r) { r.mutable_ticket()->set_sparsity_digest("pbs-0"); },
            "sparsity_digest pbs-0 of the ticket is not the lease's exact",
            StatusCode::FAILED_PRECONDITION),
        BadFetch(
            "layer_past_the_end", [](auto& r) { r.set_layer_begin(3); },
            "layer_begin 3 is outside [0, 2]"),
        BadFetch(
            "negative_token", [](auto& r) { r.set_token_begin(-1); },
            "token_begin -1 is outside [0, 39]"),
        BadFetch(
            "too_many_heads", [](auto& r) { r.set_head_count(3); },
            "head_count 3 is outside [1, 2] from head_begin 0"),
        BadFetch(
            "dtype", [](auto& r) { r.set_dtype(v1::I64); },
            "dtype I64 is not one of F32, F16, BF16"),
        BadFetch(
            "layout", [](auto& r) { r.set_layout(static_cast<v1::KvLayout>(3)); },
            "layout 3 is not one of NHD (1), HND (2)"),
        BadFetch(
            "page_tokens_0", [](auto& r) { r.set_page_tokens(0); },
            "page_tokens 0 is outside [1, 1048576]"),
        BadFetch(
            "chunk_bytes", [](auto& r) { r.set_chunk_bytes(5 << 20); },
            "chunk_bytes 5242880 is outside [65536, 4194304]")),
    testing_support::CaseName());

// ---- bytes that are no messages

BadInputCase Malformed(const char* name, const char* method, const std::string& bytes,
                       const char* message) {
  return {name,
          [=](BadInputNode& node) {
            const grpc::Slice slice(bytes);
            return node.Call(method, {grpc::ByteBuffer(&slice, 1)});
          },
          StatusCode::INVALID_ARGUMENT, message};
}

INSTANTIATE_TEST_SUITE_P(
    Bytes, BadInputSpec,
    testing::Values(
        Malformed("prefill", "/pbs.v1.Prefill/Prefill", "\xFF\xFF",
                  "malformed pbs.v1.PrefillRequest of 2 bytes"),
        Malformed("attend", "/pbs.v1.Attention/Attend", "\x12\x50",
                  "malformed AttendRequest at byte 2 of 2"),
        Malformed("describe", "/pbs.v1.KvSource/Describe", "\x0A\x7F",
                  "malformed pbs.v1.KvTicket of 2 bytes"),
        Malformed("fetch", "/pbs.v1.KvSource/Fetch", "\x0A\x7F",
                  "malformed pbs.v1.FetchRequest of 2 bytes"),
        Malformed("ticket_handle_is_no_utf8", "/pbs.v1.KvSource/Describe",
                  "\x0A\x02\xC0\x80", "malformed pbs.v1.KvTicket of 4 bytes"),
        BadInputCase{"message_past_the_limit",
                     [](BadInputNode& node) {
                       const grpc::Slice slice(Zeros(6 << 20));
                       return node.Call("/pbs.v1.Prefill/Prefill",
                                        {grpc::ByteBuffer(&slice, 1)});
                     },
                     StatusCode::RESOURCE_EXHAUSTED,
                     "Received message larger than max (6291456 vs. 5308416)"},
        BadInputCase{
            "unknown_method",
            [](BadInputNode& node) { return node.Call("/pbs.v1.Prefill/Nothing", {}); },
            StatusCode::UNIMPLEMENTED, ""},
        BadInputCase{
            "kv_sink_is_not_served",
            [](BadInputNode& node) { return node.Call("/pbs.v1.KvSink/Receive", {}); },
            StatusCode::UNIMPLEMENTED, ""}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
