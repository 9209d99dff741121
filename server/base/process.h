// Facts of the operating system about this process: memory, limits, CPUs.
//
// Threading: safe from any thread; each call reads the current values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace pbs::server {

// Resident memory: the current value, and the highest since start or the last reset; 0
// where the system does not tell.
int64_t ResidentBytes();
int64_t PeakResidentBytes();
// Resets the peak to the current value. Unavailable where the system cannot.
absl::Status ResetPeakResidentBytes();

// The folder of the pseudo files; tests use a folder of their own.
struct SystemRoot {
  std::string path;  // in front of "/proc" and "/sys"
};

// Memory this process may use: the smallest of the machine's memory, the limits of its
// control groups (v2, or v1) and their parents, and its own (ulimit -v, ulimit -d).
int64_t MemoryLimitBytes(const SystemRoot& root = {});

// CPUs this process may use, at least 1: its affinity mask, cut to the CPU quota of its
// control groups, rounded up.
int32_t UsableCpus(const SystemRoot& root = {});

// Tunes glibc's allocator for a server that allocates and frees chunks of up to 4 MiB
// at a high rate from many threads: by default it maps and unmaps each one, and keeps
// an arena per thread. Call before other threads start.
void TuneMalloc();

// Returns the pages of freed memory of all arenas to the system. It takes milliseconds,
// during which other threads may wait for memory.
void ReturnFreedMemory();

// ---- the parsers, public for their tests

// Bytes of a "Name:   123 kB" line of /proc/self/status or /proc/meminfo.
std::optional<int64_t> ParseKilobyteLine(std::string_view text, std::string_view name);
// cpu.max: "max 100000" is no quota, "150000 100000" is 1.5 CPUs.
std::optional<double> ParseCpuMax(std::string_view text);

}  // namespace pbs::server
