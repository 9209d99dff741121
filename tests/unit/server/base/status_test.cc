// Spec: server/base/status.h.
#include "server/base/status.h"

#include <gtest/gtest.h>

#include <memory>
#include <optional>

namespace pbs::server {
namespace {

struct CodeCase {
  const char* name;
  StatusCode code;
  absl::StatusCode absl_code;
};

class StatusConversionSpec : public testing::TestWithParam<CodeCase> {};

TEST_P(StatusConversionSpec, KeepsCodeAndMessage) {
  const absl::Status status =
      ToAbsl(pbs::Status(GetParam().code, "seq_len 3 exceeds 2"));
  EXPECT_EQ(status.code(), GetParam().absl_code);
  EXPECT_EQ(status.message(), "seq_len 3 exceeds 2");
  EXPECT_EQ(absl::StatusCodeToString(status.code()), StatusCodeName(GetParam().code));
}

INSTANTIATE_TEST_SUITE_P(
    Codes, StatusConversionSpec,
    testing::Values(
        CodeCase{"cancelled", StatusCode::kCancelled, absl::StatusCode::kCancelled},
        CodeCase{"unknown", StatusCode::kUnknown, absl::StatusCode::kUnknown},
        CodeCase{"invalid_argument", StatusCode::kInvalidArgument,
                 absl::StatusCode::kInvalidArgument},
        CodeCase{"deadline_exceeded", StatusCode::kDeadlineExceeded,
                 absl::StatusCode::kDeadlineExceeded},
        CodeCase{"not_found", StatusCode::kNotFound, absl::StatusCode::kNotFound},
        CodeCase{"resource_exhausted", StatusCode::kResourceExhausted,
                 absl::StatusCode::kResourceExhausted},
        CodeCase{"failed_precondition", StatusCode::kFailedPrecondition,
                 absl::StatusCode::kFailedPrecondition},
        CodeCase{"unimplemented", StatusCode::kUnimplemented,
                 absl::StatusCode::kUnimplemented},
        CodeCase{"internal", StatusCode::kInternal, absl::StatusCode::kInternal},
        CodeCase{"unavailable", StatusCode::kUnavailable,
                 absl::StatusCode::kUnavailable},
        CodeCase{"data_loss", StatusCode::kDataLoss, absl::StatusCode::kDataLoss}),
    [](const auto& param) { return std::string(param.param.name); });

TEST(StatusConversion, OkStaysOk) { EXPECT_TRUE(ToAbsl(pbs::OkStatus()).ok()); }

TEST(StatusConversion, AValueMovesThrough) {
  auto result = ToAbsl(pbs::StatusOr<std::unique_ptr<int>>(std::make_unique<int>(7)));
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(**result, 7);
}

TEST(StatusConversion, AMissingValueBecomesItsReason) {
  const auto result = ToAbsl(pbs::StatusOr<int>(NotFound("model x")));
  EXPECT_EQ(result.status(), absl::NotFoundError("model x"));
}

TEST(RetryAdvice, IsGivenByDefaultOnlyWhenSomethingRanOut) {
  EXPECT_EQ(RetryAfter(absl::ResourceExhaustedError("full")), kRetryAfterDefault);
  EXPECT_EQ(RetryAfter(absl::InvalidArgumentError("bad")), std::nullopt);
  EXPECT_EQ(RetryAfter(absl::UnavailableError("draining")), std::nullopt);
}

TEST(RetryAdvice, TravelsWithTheStatus) {
  const absl::Status status =
      WithRetryAfter(absl::UnavailableError("loading"), absl::Milliseconds(2500));
  EXPECT_EQ(RetryAfter(status), absl::Milliseconds(2500));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
}

TEST(RetryAdvice, NeverTurnsOkIntoSomethingElse) {
  EXPECT_TRUE(WithRetryAfter(absl::OkStatus(), absl::Seconds(1)).ok());
  EXPECT_EQ(RetryAfter(absl::OkStatus()), std::nullopt);
}

}  // namespace
}  // namespace pbs::server
