// Status and StatusOr of the data plane: abseil's code values without the dependency.
//
// The code says what the caller should do (docs/PROTOCOL.md, "Errors"); the message
// names field, value and limit: `seq_len 140000 exceeds seq_len_max 131072`. Messages
// never hold prompts, token ids or tensor values.
//
// Threading: values; as safe as std::string. Memory: an OK status owns nothing.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "pbs/check.h"

namespace pbs {

// Numeric values equal absl::StatusCode and grpc::StatusCode.
enum class StatusCode : int {
  kOk = 0,
  kCancelled = 1,
  kUnknown = 2,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kAlreadyExists = 6,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kDataLoss = 15,
};

// "INVALID_ARGUMENT" and so on; "UNKNOWN" for a value outside the enum.
const char* StatusCodeName(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message)
      : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

  // "OK", or "INVALID_ARGUMENT: threshold 1.5 is outside (0, 1]".
  std::string ToString() const;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status OkStatus() { return Status(); }
Status InvalidArgument(std::string message);
Status Unavailable(std::string message);
Status NotFound(std::string message);
Status ResourceExhausted(std::string message);
Status FailedPrecondition(std::string message);
Status Cancelled(std::string message);
Status Unimplemented(std::string message);
Status Internal(std::string message);
Status DataLoss(std::string message);

// A value, or the reason there is none.
template <class T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(T value) : value_(std::move(value)) {}
  StatusOr(Status status) : status_(std::move(status)) { PBS_CHECK(!status_.ok()); }

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }

  T& operator*() & { return CheckedValue(); }
  const T& operator*() const& { return const_cast<StatusOr*>(this)->CheckedValue(); }
  T&& operator*() && { return std::move(CheckedValue()); }
  T* operator->() { return &CheckedValue(); }
  const T* operator->() const { return &const_cast<StatusOr*>(this)->CheckedValue(); }

 private:
  T& CheckedValue() {
    PBS_CHECK(value_.has_value());
    return *value_;
  }

  Status status_;
  std::optional<T> value_;
};

}  // namespace pbs

#define PBS_CONCAT_INNER(a, b) a##b
#define PBS_CONCAT(a, b) PBS_CONCAT_INNER(a, b)

#define PBS_RETURN_IF_ERROR(expression)                     \
  do {                                                      \
    if (auto pbs_status = (expression); !pbs_status.ok()) { \
      return pbs_status;                                    \
    }                                                       \
  } while (false)

#define PBS_ASSIGN_OR_RETURN(target, expression) \
  PBS_ASSIGN_OR_RETURN_INNER(PBS_CONCAT(pbs_result_, __LINE__), target, expression)
#define PBS_ASSIGN_OR_RETURN_INNER(result, target, expression) \
  auto result = (expression);                                  \
  if (!result.ok()) return result.status();                    \
  target = *std::move(result)
