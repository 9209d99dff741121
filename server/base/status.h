// Converts the data plane's Status to the control plane's.
//
// pbs::Status and absl::Status share their code values; only this file converts the
// former to the latter. It also attaches the advice "try again after" to a status,
// which grpc_status.h puts on the wire.
//
// Threading: stateless.
#pragma once

#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "pbs/status.h"

namespace pbs::server {

// Same code, same message.
absl::Status ToAbsl(const pbs::Status& status);

template <class T>
absl::StatusOr<T> ToAbsl(pbs::StatusOr<T> result) {
  if (!result.ok()) return ToAbsl(result.status());
  return *std::move(result);
}

// `status` with the advice to repeat the call after `delay`. OK stays OK.
absl::Status WithRetryAfter(absl::Status status, absl::Duration delay);
// The delay of WithRetryAfter(). Without it, kRetryAfterDefault for ResourceExhausted
// and nullopt for other codes.
std::optional<absl::Duration> RetryAfter(const absl::Status& status);

inline constexpr absl::Duration kRetryAfterDefault = absl::Seconds(1);

}  // namespace pbs::server

// Control-plane twins of PBS_RETURN_IF_ERROR and PBS_ASSIGN_OR_RETURN, for functions
// that return absl::Status or absl::StatusOr.
#define PBS_ABSL_RETURN_IF_ERROR(expression)                                  \
  do {                                                                        \
    if (absl::Status pbs_absl_status = (expression); !pbs_absl_status.ok()) { \
      return pbs_absl_status;                                                 \
    }                                                                         \
  } while (false)

#define PBS_ABSL_ASSIGN_OR_RETURN(target, expression)                             \
  PBS_ABSL_ASSIGN_OR_RETURN_INNER(PBS_CONCAT(pbs_absl_result_, __LINE__), target, \
                                  expression)
#define PBS_ABSL_ASSIGN_OR_RETURN_INNER(result, target, expression) \
  auto result = (expression);                                       \
  if (!result.ok()) return std::move(result).status();              \
  target = *std::move(result)
