// The self-test of a backend: it runs small fixed attention problems of every method
// and dtype of its info() that the f64 reference has, and compares with the reference.
// A server that fails it must not serve.
//
// Threading: uses the backend; call it before any other use of the backend.
// Memory: a few megabytes, freed on return.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "pbs/backend.h"

namespace pbs::server {

struct SelfTestReport {
  int32_t num_cases = 0;       // cases that ran
  double worst_f32_error = 0;  // largest |o - reference| of f32 cases; 0: none ran
};

// Internal names the first case outside its tolerance, with error and tolerance. Errors
// of the backend are passed on. Cases that the backend does not implement are skipped,
// but at least one case of every dtype of memory.info() must run. Tensors are in
// `memory`, which in a server is the same object as `attention`.
absl::StatusOr<SelfTestReport> RunSelfTest(AttentionBackend& attention,
                                           Backend& memory);

}  // namespace pbs::server
