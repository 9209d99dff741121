// CPU seconds of a process, the sum over all its threads.
//
// Threading: safe from any thread.
#pragma once

#include <sys/types.h>

#include <optional>

namespace pbs::bench {

// User and system time since the process started, to the nanosecond (/proc/PID/stat
// counts hundredths). nullopt when there is no such process, or for pid 0.
std::optional<double> CpuSeconds(pid_t pid);

}  // namespace pbs::bench
