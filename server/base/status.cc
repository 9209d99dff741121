#include "server/base/status.h"

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace pbs::server {
namespace {

constexpr char kRetryAfterUrl[] = "pbs/retry_after_ms";

}  // namespace

absl::Status ToAbsl(const pbs::Status& status) {
  return {static_cast<absl::StatusCode>(status.code()), status.message()};
}

absl::Status WithRetryAfter(absl::Status status, absl::Duration delay) {
  status.SetPayload(kRetryAfterUrl,
                    absl::Cord(absl::StrCat(absl::ToInt64Milliseconds(delay))));
  return status;
}

std::optional<absl::Duration> RetryAfter(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryAfterUrl);
  int64_t milliseconds = 0;
  if (payload.has_value() && absl::SimpleAtoi(std::string(*payload), &milliseconds)) {
    return absl::Milliseconds(milliseconds);
  }
  if (status.code() == absl::StatusCode::kResourceExhausted) return kRetryAfterDefault;
  return std::nullopt;
}

}  // namespace pbs::server
