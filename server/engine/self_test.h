// The self-test of a backend: small fixed attention problems, every method and dtype,
// against the f64 reference. A server that fails it must not serve.
//
// Threading: uses the backend; call before anything else does.
// Memory: a few megabytes, given back on return.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "pbs/backend.h"

namespace pbs::server {

struct SelfTestReport {
  int32_t num_cases = 0;       // that ran
  double worst_f32_error = 0;  // largest |o - reference| of f32 cases; 0: none ran
};

// Internal names the first case that is outside its tolerance, with the error and the
// tolerance; a failure of the backend itself is passed on. Cases that it says it does
// not have are left out; at least one of every dtype of memory.info() must run. Tensors
// lie in `memory`, which in a server is `attention` itself.
absl::StatusOr<SelfTestReport> RunSelfTest(AttentionBackend& attention,
                                           Backend& memory);

}  // namespace pbs::server
