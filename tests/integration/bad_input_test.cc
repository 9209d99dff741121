// Spec: docs/PROTOCOL.md "Errors", for Prefill, KvSource and bytes that are no
// messages.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "tests/integration/bad_input.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using grpc::StatusCode;

class BadInputSpec : public testing::TestWithParam<BadInputCase> {};

TEST_P(BadInputSpec, IsRefusedExactlyAndLeavesNothingBehind) {
  ExpectRefused(GetParam());
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
            "idempotency_key needs delivery lease: equal keys return the same lease"),
        BadPrefill(
            "threshold_0",
            [](auto& r) { r.mutable_attention()->mutable_pbs()->set_threshold(0); },
            "threshold 0 is outside (0, 1]"),
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
            "vertical_tokens",
            [](auto& r) {
              r.mutable_attention()->mutable_minference()->set_vertical_tokens(0);
            },
            "vertical_tokens 0 is outside [1, 1048576]"),
        BadPrefill(
            "gamma",
            [](auto& r) {
              r.mutable_attention()->mutable_flexprefill()->set_gamma(1.5f);
            },
            "gamma 1.5 is outside (0, 1]"),
        BadPrefill(
            "push", [](auto& r) { r.mutable_delivery()->mutable_push(); },
            "delivery.push.target \"\" is empty; it names the host:port of a sink"),
        BadPrefill(
            "push_target_that_is_not_allowed",
            [](auto& r) {
              r.mutable_delivery()->mutable_push()->set_target("127.0.0.1:22");
            },
            "delivery.push.target \"127.0.0.1:22\" is not one of this server's "
            "push_targets"),
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
            "dtype U16 is not one of F32, F16, BF16, F8_E4M3"),
        BadPrefill(
            "inline_page_tokens_0",
            [](auto& r) {
              r.mutable_delivery()->mutable_inline_()->set_page_tokens(0);
            },
            "page_tokens 0 is outside [1, 1048576]"),
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
            "dtype I64 is not one of F32, F16, BF16, F8_E4M3"),
        BadFetch(
            "resume_kind",
            [](auto& r) { r.mutable_resume()->set_kind(v1::KvChunk::Q); },
            "resume.kind 3 is not one of K (1), V (2)"),
        BadFetch(
            "resume_head",
            [](auto& r) {
              r.mutable_resume()->set_kind(v1::KvChunk::K);
              r.mutable_resume()->set_head(2);
            },
            "resume.head 2 is outside [0, 1]"),
        BadFetch(
            "resume_token",
            [](auto& r) {
              r.mutable_resume()->set_kind(v1::KvChunk::V);
              r.mutable_resume()->set_token(40);
            },
            "resume.token 40 is outside [0, 39]"),
        BadFetch(
            "resume_inside_a_token_of_nhd",
            [](auto& r) {
              r.set_layout(v1::NHD);
              r.mutable_resume()->set_kind(v1::KvChunk::V);
              r.mutable_resume()->set_head(1);
            },
            "resume.head 1 is not head_begin 0: in layout NHD a chunk begins with the "
            "first head of a token"),
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
                       const grpc::Slice slice(std::string(6 << 20, '\0'));
                       return node.Call("/pbs.v1.Prefill/Prefill",
                                        {grpc::ByteBuffer(&slice, 1)});
                     },
                     StatusCode::RESOURCE_EXHAUSTED,
                     "Received message larger than max (6291456 vs. 5308416)"},
        BadInputCase{
            "unknown_method",
            [](BadInputNode& node) { return node.Call("/pbs.v1.Prefill/Nothing", {}); },
            StatusCode::UNIMPLEMENTED,
            "no method \"/pbs.v1.Prefill/Nothing\"; this server has pbs.v1 and "
            "grpc.health.v1.Health"},
        BadInputCase{
            "kv_sink_is_not_served",
            [](BadInputNode& node) { return node.Call("/pbs.v1.KvSink/Receive", {}); },
            StatusCode::UNIMPLEMENTED,
            "no method \"/pbs.v1.KvSink/Receive\"; this server has pbs.v1 and "
            "grpc.health.v1.Health"}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
