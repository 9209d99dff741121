// Spec: server/codec/prefill_request.h.
#include "server/codec/prefill_request.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

const std::vector<std::string> kSinks = {"decode-0.example:50070"};

// The default profile is pbs as a request that names it gets it.
PrefillLimits Limits() {
  PrefillLimits limits;
  limits.default_attention.options.dense_tail_blocks = kPrefillTailBlocks;
  limits.tokens_max = 1000;
  limits.vocab_size = 512;
  limits.num_layers = 3;
  limits.num_heads = 4;
  limits.num_kv_heads = 2;
  limits.head_dim = 64;
  limits.chunk_bytes_default = 1 << 20;
  limits.push_targets = kSinks;
  return limits;
}

v1::PrefillRequest GoodRequest() {
  v1::PrefillRequest request;
  request.set_request_id("r1");
  for (uint32_t token : {1, 2, 511}) request.add_token_ids(token);
  return request;
}

TEST(DecodePrefillSpec, FillsEveryUnsetFieldWithItsDefault) {
  const auto spec = DecodePrefill(GoodRequest(), Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->request_id, "r1");
  EXPECT_EQ(spec->tokens, (std::vector<int32_t>{1, 2, 511}));
  EXPECT_EQ(spec->attention.method, Method::kPbs);
  EXPECT_TRUE(spec->attention.dense_fallback);
  EXPECT_EQ(spec->delivery, Delivery::kNone);
  EXPECT_EQ(spec->top_logits, 0);
  EXPECT_FALSE(spec->ttl_seconds.has_value());
}

TEST(DecodePrefillSpec, KeepsTheFormatOfAPush) {
  v1::PrefillRequest request = GoodRequest();
  v1::KvDelivery::Push& push = *request.mutable_delivery()->mutable_push();
  push.set_target(kSinks[0]);
  push.set_dtype(v1::BF16);
  push.set_layout(v1::NHD);
  push.set_chunk_bytes(65'536);
  push.set_checksums(false);
  push.set_page_tokens(16);
  const auto spec = DecodePrefill(request, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->delivery, Delivery::kPush);
  EXPECT_EQ(spec->push_target, kSinks[0]);
  EXPECT_EQ(spec->push_format.dtype, DType::kBF16);
  EXPECT_EQ(spec->push_format.layout, KvLayout::kNhd);
  EXPECT_EQ(spec->push_format.chunk_bytes, 65'536);
  EXPECT_EQ(spec->push_format.page_tokens, 16);
  EXPECT_FALSE(spec->push_format.checksums);
}

TEST(DecodePrefillSpec, KeepsWhatIsSet) {
  v1::PrefillRequest request = GoodRequest();
  request.mutable_attention()->mutable_mean_pooling()->set_threshold(0.5f);
  request.mutable_attention()->set_dense_fallback(false);
  request.mutable_delivery()->mutable_inline_()->set_dtype(v1::F16);
  request.mutable_delivery()->mutable_inline_()->set_layout(v1::NHD);
  request.mutable_delivery()->mutable_inline_()->set_checksums(false);
  request.set_top_logits(5);
  request.add_logit_positions(0);
  request.add_logit_positions(2);
  request.set_priority(-100);
  const auto spec = DecodePrefill(request, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->attention.method, Method::kMeanPooling);
  EXPECT_FALSE(spec->attention.dense_fallback);
  EXPECT_EQ(spec->delivery, Delivery::kInline);
  EXPECT_EQ(spec->inline_format.dtype, DType::kF16);
  EXPECT_EQ(spec->inline_format.layout, KvLayout::kNhd);
  EXPECT_EQ(spec->inline_format.chunk_bytes, 1 << 20);
  EXPECT_FALSE(spec->inline_format.checksums);
  EXPECT_EQ(spec->logit_positions, (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(spec->priority, -100);
}

TEST(DecodePrefillSpec, TheServersProfileServesRequestsThatNameNoMethod) {
  PrefillLimits limits = Limits();
  limits.default_attention.options = DefaultOptions(Method::kDense);
  EXPECT_EQ(DecodePrefill(GoodRequest(), limits)->attention.method, Method::kDense);
}

TEST(DecodePrefillSpec, ANamedMethodGetsADenseTailUnlessTheRequestDecides) {
  struct Case {
    const char* name;
    std::function<void(v1::AttentionOptions&)> change;
    int32_t tail;
  };
  const Case cases[] = {
      {"pbs", [](auto& o) { o.mutable_pbs(); }, kPrefillTailBlocks},
      {"prism", [](auto& o) { o.mutable_prism(); }, kPrefillTailBlocks},
      {"dense", [](auto& o) { o.mutable_dense(); }, 0},
      {"none", [](auto& o) { o.mutable_pbs(), o.set_dense_tail_blocks(0); }, 0},
      {"five", [](auto& o) { o.mutable_pbs(), o.set_dense_tail_blocks(5); }, 5},
      {"published", [](auto& o) { o.mutable_pbs(), o.set_as_published(true); }, 0},
      {"profile", [](auto& o) { o.set_coverage_rows(1); }, 7},
  };
  PrefillLimits limits = Limits();
  limits.default_attention.options.dense_tail_blocks = 7;
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    v1::PrefillRequest request = GoodRequest();
    request.clear_attention();
    c.change(*request.mutable_attention());
    const auto spec = DecodePrefill(request, limits);
    ASSERT_TRUE(spec.ok()) << spec.status();
    EXPECT_EQ(spec->attention.dense_tail_blocks, c.tail);
  }
}

TEST(DecodePrefillSpec, TheServersProfileMayTurnTheDenseFallbackOff) {
  PrefillLimits limits = Limits();
  limits.default_attention.dense_fallback = false;
  EXPECT_FALSE(DecodePrefill(GoodRequest(), limits)->attention.dense_fallback);
}

struct RefusedCase {
  const char* name;
  std::function<void(v1::PrefillRequest&)> change;
  const char* message;
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

class RefusedPrefillSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedPrefillSpec, NamesFieldValueAndLimit) {
  v1::PrefillRequest request = GoodRequest();
  GetParam().change(request);
  const auto spec = DecodePrefill(request, Limits());
  EXPECT_EQ(std::string(spec.status().message()), GetParam().message);
  EXPECT_EQ(spec.status().code(), GetParam().code);
}

TEST(DecodePrefillSpec, SaysWhyAModelsLimitIsWhatItIs) {
  PrefillLimits limits = Limits();
  limits.tokens_max_reason = " (dual chunk attention)";
  v1::PrefillRequest request = GoodRequest();
  request.mutable_token_ids()->Resize(1001, 1);
  EXPECT_EQ(DecodePrefill(request, limits).status().message(),
            "number of token_ids 1001 is outside [1, 1000] (dual chunk attention)");
}

constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Tokens, RefusedPrefillSpec,
    testing::Values(RefusedCase{"none", [](auto& r) { r.clear_token_ids(); },
                                "number of token_ids 0 is outside [1, 1000]"},
                    RefusedCase{"too_many",
                                [](auto& r) { r.mutable_token_ids()->Resize(1001, 1); },
                                "number of token_ids 1001 is outside [1, 1000]"},
                    RefusedCase{"at_vocab_size",
                                [](auto& r) { r.set_token_ids(1, 512); },
                                "token_ids[1] is not below vocab_size 512"},
                    RefusedCase{"huge", [](auto& r) { r.set_token_ids(2, UINT32_MAX); },
                                "token_ids[2] is not below vocab_size 512"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Texts, RefusedPrefillSpec,
    testing::Values(
        RefusedCase{"request_id",
                    [](auto& r) { r.set_request_id(std::string(129, 'x')); },
                    "request_id has 129 bytes, more than 128"},
        RefusedCase{"idempotency_key",
                    [](auto& r) { r.set_idempotency_key(std::string(200, 'x')); },
                    "idempotency_key has 200 bytes, more than 128"},
        RefusedCase{"tenant_salt",
                    [](auto& r) { r.set_tenant_salt(std::string(129, 'x')); },
                    "tenant_salt has 129 bytes, more than 128"},
        RefusedCase{
            "key_without_lease", [](auto& r) { r.set_idempotency_key("k"); },
            "idempotency_key needs delivery lease: equal keys return the same lease"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Attention, RefusedPrefillSpec,
    testing::Values(
        RefusedCase{
            "threshold",
            [](auto& r) { r.mutable_attention()->mutable_pbs()->set_threshold(2); },
            "threshold 2 is outside (0, 1]"},
        RefusedCase{"segment_size",
                    [](auto& r) {
                      r.mutable_attention()->mutable_pbs()->set_segment_size(100);
                    },
                    "segment_size 100 is not a multiple of block_size 128"},
        RefusedCase{"scope",
                    [](auto& r) {
                      r.mutable_attention()->mutable_pbs()->set_scope(
                          static_cast<v1::Scope>(9));
                    },
                    "scope 9 is not one of KV_HEAD (1), QUERY_HEAD (2)"},
        RefusedCase{
            "given_order",
            [](auto& r) {
              r.mutable_attention()->mutable_pbs()->set_use_given_order(true);
            },
            "use_given_order true is for Attend only: a prefill brings no tensors"},
        RefusedCase{
            "given_lists",
            [](auto& r) {
              r.mutable_attention()->mutable_mean_pooling()->set_use_given_lists(true);
            },
            "use_given_lists true is for Attend only: a prefill brings no tensors"},
        RefusedCase{"coverage_rows",
                    [](auto& r) { r.mutable_attention()->set_coverage_rows(-1); },
                    "coverage_rows -1 is outside [0, 1024]"},
        RefusedCase{"alpha",
                    [](auto& r) {
                      r.mutable_attention()->mutable_flashprefill()->set_alpha(1.5f);
                    },
                    "alpha 1.5 is outside (0, 1]"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    DeliveryAndResults, RefusedPrefillSpec,
    testing::Values(
        RefusedCase{"push_without_target",
                    [](auto& r) { r.mutable_delivery()->mutable_push(); },
                    "delivery.push.target \"\" is empty; it names the host:port of a "
                    "sink"},
        RefusedCase{"push_target_unknown",
                    [](auto& r) {
                      r.mutable_delivery()->mutable_push()->set_target("10.0.0.1:80");
                    },
                    "delivery.push.target \"10.0.0.1:80\" is not one of this server's "
                    "push_targets"},
        RefusedCase{
            "push_target_of_another_case",
            [](auto& r) {
              r.mutable_delivery()->mutable_push()->set_target(
                  "Decode-0.example:50070");
            },
            "delivery.push.target \"Decode-0.example:50070\" is not one of this "
            "server's push_targets"},
        RefusedCase{
            "push_target_with_control_characters",
            [](auto& r) { r.mutable_delivery()->mutable_push()->set_target("a\nb:1"); },
            "delivery.push.target \"a\\nb:1\" is not one of this server's "
            "push_targets"},
        RefusedCase{"push_page_tokens",
                    [](auto& r) {
                      auto& push = *r.mutable_delivery()->mutable_push();
                      push.set_target(kSinks[0]);
                      push.set_page_tokens(0);
                    },
                    "page_tokens 0 is outside [1, 1048576]"},
        RefusedCase{"push_idempotency",
                    [](auto& r) {
                      r.mutable_delivery()->mutable_push()->set_target(kSinks[0]);
                      r.set_idempotency_key("k");
                    },
                    "idempotency_key needs delivery lease: equal keys return the same "
                    "lease"},
        RefusedCase{"push_captured_queries",
                    [](auto& r) {
                      r.mutable_delivery()->mutable_push()->set_target(kSinks[0]);
                      r.add_capture_query_layers(0);
                    },
                    "capture_query_layers needs delivery lease: a fetch delivers the "
                    "queries"},
        RefusedCase{"inline_page_tokens",
                    [](auto& r) {
                      r.mutable_delivery()->mutable_inline_()->set_page_tokens(0);
                    },
                    "page_tokens 0 is outside [1, 1048576]"},
        RefusedCase{"prefix_ticket", [](auto& r) { r.mutable_prefix_ticket(); },
                    "prefix_ticket is reserved: this server reuses no prefixes yet",
                    kUnimplemented},
        RefusedCase{"inline_dtype",
                    [](auto& r) {
                      r.mutable_delivery()->mutable_inline_()->set_dtype(v1::I32);
                    },
                    "dtype I32 is not one of F32, F16, BF16, F8_E4M3"},
        RefusedCase{"inline_layout",
                    [](auto& r) {
                      r.mutable_delivery()->mutable_inline_()->set_layout(
                          static_cast<v1::KvLayout>(7));
                    },
                    "layout 7 is not one of NHD (1), HND (2)"},
        RefusedCase{"inline_chunk_bytes",
                    [](auto& r) {
                      r.mutable_delivery()->mutable_inline_()->set_chunk_bytes(65535);
                    },
                    "chunk_bytes 65535 is outside [65536, 4194304]"},
        RefusedCase{"top_logits", [](auto& r) { r.set_top_logits(101); },
                    "top_logits 101 is outside [0, 100]"},
        RefusedCase{"negative_top_logits", [](auto& r) { r.set_top_logits(-1); },
                    "top_logits -1 is outside [0, 100]"},
        RefusedCase{"positions_without_top", [](auto& r) { r.add_logit_positions(0); },
                    "logit_positions need a top_logits of at least 1, not 0"},
        RefusedCase{"too_many_positions",
                    [](auto& r) {
                      r.set_top_logits(1);
                      r.mutable_logit_positions()->Resize(257, 0);
                    },
                    "number of logit_positions 257 is outside [0, 256]"},
        RefusedCase{"position_past_the_prompt",
                    [](auto& r) {
                      r.set_top_logits(1);
                      r.add_logit_positions(3);
                    },
                    "logit_positions[0] 3 is not below the number of token_ids 3"},
        RefusedCase{"priority", [](auto& r) { r.set_priority(101); },
                    "priority 101 is outside [-100, 100]"}),
    testing_support::CaseName());

void CaptureLayers(v1::PrefillRequest& request, const std::vector<int32_t>& layers) {
  request.mutable_delivery()->mutable_lease();
  request.mutable_capture_query_layers()->Add(layers.begin(), layers.end());
}

INSTANTIATE_TEST_SUITE_P(
    QueryLayers, RefusedPrefillSpec,
    testing::Values(
        RefusedCase{"without_lease", [](auto& r) { r.add_capture_query_layers(0); },
                    "capture_query_layers needs delivery lease: a fetch delivers the "
                    "queries"},
        RefusedCase{"past_the_last",
                    [](auto& r) {
                      CaptureLayers(r, {0, 3});
                    },
                    "capture_query_layers[1] 3 is outside [0, 2]"},
        RefusedCase{"negative", [](auto& r) { CaptureLayers(r, {-1}); },
                    "capture_query_layers[0] -1 is outside [0, 2]"},
        RefusedCase{"repeated",
                    [](auto& r) {
                      CaptureLayers(r, {1, 1});
                    },
                    "capture_query_layers[1] 1 is not above the layer before it, 1"},
        RefusedCase{"too_many",
                    [](auto& r) {
                      CaptureLayers(r, {0, 1, 2, 2});
                    },
                    "number of capture_query_layers 4 is outside [0, 3]"}),
    testing_support::CaseName());

TEST(DecodePrefillSpec, KeepsTheLayersWhoseQueriesAreCaptured) {
  v1::PrefillRequest request = GoodRequest();
  CaptureLayers(request, {0, 2});
  EXPECT_EQ(DecodePrefill(request, Limits())->query_layers,
            (std::vector<int32_t>{0, 2}));
  EXPECT_TRUE(DecodePrefill(GoodRequest(), Limits())->query_layers.empty());
}

struct FingerprintCase {
  const char* name;
  std::function<void(v1::PrefillRequest&)> change;
  bool is_equal;  // to GoodRequest()
};

std::string FingerprintOf(const v1::PrefillRequest& request, const char* model) {
  const auto spec = DecodePrefill(request, Limits());
  EXPECT_TRUE(spec.ok()) << spec.status();
  return spec.ok() ? PrefillFingerprint(*spec, model) : "";
}

class PrefillFingerprintSpec : public testing::TestWithParam<FingerprintCase> {};

TEST_P(PrefillFingerprintSpec, DependsOnWhatDecidesTheResultAndOnNothingElse) {
  v1::PrefillRequest request = GoodRequest();
  GetParam().change(request);
  EXPECT_EQ(FingerprintOf(request, "model") == FingerprintOf(GoodRequest(), "model"),
            GetParam().is_equal);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, PrefillFingerprintSpec,
    testing::Values(
        FingerprintCase{"request_id", [](auto& r) { r.set_request_id("b"); }, true},
        FingerprintCase{"priority", [](auto& r) { r.set_priority(5); }, true},
        FingerprintCase{
            "time_to_live",
            [](auto& r) { r.mutable_delivery()->mutable_lease()->set_ttl_seconds(9); },
            true},
        FingerprintCase{"the_default_method_by_name",
                        [](auto& r) { r.mutable_attention()->mutable_pbs(); }, true},
        FingerprintCase{
            "the_default_threshold",
            [](auto& r) { r.mutable_attention()->mutable_pbs()->set_threshold(0.9f); },
            true},
        FingerprintCase{"the_default_scope",
                        [](auto& r) {
                          r.mutable_attention()->mutable_pbs()->set_scope(v1::KV_HEAD);
                        },
                        true},
        FingerprintCase{
            "the_default_fallback",
            [](auto& r) { r.mutable_attention()->set_dense_fallback(true); }, true},
        FingerprintCase{"no_coverage_rows",
                        [](auto& r) { r.mutable_attention()->set_coverage_rows(0); },
                        true},
        FingerprintCase{
            "another_threshold",
            [](auto& r) { r.mutable_attention()->mutable_pbs()->set_threshold(0.8f); },
            false},
        FingerprintCase{"another_method",
                        [](auto& r) { r.mutable_attention()->mutable_dense(); }, false},
        FingerprintCase{
            "no_fallback",
            [](auto& r) { r.mutable_attention()->set_dense_fallback(false); }, false},
        FingerprintCase{"coverage_rows",
                        [](auto& r) { r.mutable_attention()->set_coverage_rows(8); },
                        false},
        FingerprintCase{"a_token", [](auto& r) { r.set_token_ids(0, 9); }, false},
        FingerprintCase{"top_logits", [](auto& r) { r.set_top_logits(1); }, false},
        FingerprintCase{"all_logits",
                        [](auto& r) { r.set_all_logits_last_token(true); }, false},
        FingerprintCase{"logit_positions",
                        [](auto& r) {
                          r.set_top_logits(1);
                          r.add_logit_positions(1);
                        },
                        false},
        FingerprintCase{"captured_layers", [](auto& r) { CaptureLayers(r, {1}); },
                        false},
        FingerprintCase{"tenant_salt", [](auto& r) { r.set_tenant_salt("t"); }, false}),
    testing_support::CaseName());

TEST(PrefillFingerprint, DependsOnTheModel) {
  EXPECT_NE(FingerprintOf(GoodRequest(), "model"),
            FingerprintOf(GoodRequest(), "other"));
}

TEST(PrefillFingerprint, FollowsTheServersProfile) {
  PrefillLimits limits = Limits();
  limits.default_attention.options.threshold = 0.5f;
  const auto profile = DecodePrefill(GoodRequest(), limits);
  v1::PrefillRequest named = GoodRequest();
  named.mutable_attention()->mutable_pbs()->set_threshold(0.5f);
  EXPECT_EQ(PrefillFingerprint(*profile, "m"), FingerprintOf(named, "m"));
}

}  // namespace
}  // namespace pbs::server
