// PBS_CHECK: a broken invariant stops the process, in release builds too.
//
// A bad *input* is a Status (status.h). PBS_CHECK is for states that no input can
// cause.
#pragma once

namespace pbs {

// Prints `file:line: check failed: expression` on stderr and aborts.
[[noreturn]] void CheckFailed(const char* file, int line, const char* expression);

}  // namespace pbs

#define PBS_CHECK(condition)                              \
  do {                                                    \
    if (!(condition)) [[unlikely]] {                      \
      ::pbs::CheckFailed(__FILE__, __LINE__, #condition); \
    }                                                     \
  } while (false)
