#include "server/base/process.h"

#include <malloc.h>
#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace pbs::server {
namespace {

constexpr size_t kPseudoFileBytesMax = 64 << 10;

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

// Empty when the file cannot be read.
std::string ReadPseudoFile(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return "";
  std::string text(kPseudoFileBytesMax, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file));
  std::fclose(file);
  return text;
}

// A number alone on its line; "max" and anything else is no number.
std::optional<int64_t> ParseNumber(std::string_view text) {
  int64_t value = 0;
  if (!absl::SimpleAtoi(absl::StripAsciiWhitespace(View(text)), &value)) {
    return std::nullopt;
  }
  return value;
}

struct CgroupPlace {
  bool v2 = false;
  std::string mount;  // folder of the hierarchy
  std::string group;  // path of our group in it; "" is the hierarchy's root
};

// Where `controller` ("memory", "cpu") limits us: the v1 hierarchy when the controller
// is mounted there, else the unified one.
CgroupPlace FindCgroup(const SystemRoot& root, absl::string_view controller) {
  const std::string text = ReadPseudoFile(root.path + "/proc/self/cgroup");
  CgroupPlace place = {true, root.path + "/sys/fs/cgroup", ""};
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> parts =
        absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const std::string group(absl::StripSuffix(parts[2], "/"));
    if (parts[1].empty()) {
      place.group = group;
      continue;
    }
    for (absl::string_view name : absl::StrSplit(parts[1], ',')) {
      if (name == controller) {
        return {false, root.path + "/sys/fs/cgroup/" + std::string(controller), group};
      }
    }
  }
  return place;
}

// Calls visit(folder) for our group and each of its parents. Inside a container the
// group's path may not exist below the mount, whose root then is our group.
template <class Visitor>
void ForEachGroup(const CgroupPlace& place, Visitor&& visit) {
  std::string group = place.group;
  while (true) {
    visit(place.mount + group);
    if (group.empty()) return;
    const size_t slash = group.rfind('/');
    group.resize(slash == std::string::npos ? 0 : slash);
  }
}

int64_t AffinityCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

std::optional<double> GroupCpus(const CgroupPlace& place, const std::string& folder) {
  if (place.v2) return ParseCpuMax(ReadPseudoFile(folder + "/cpu.max"));
  const auto quota = ParseNumber(ReadPseudoFile(folder + "/cpu.cfs_quota_us"));
  const auto period = ParseNumber(ReadPseudoFile(folder + "/cpu.cfs_period_us"));
  if (!quota.has_value() || !period.has_value() || *quota <= 0 || *period <= 0) {
    return std::nullopt;
  }
  return static_cast<double>(*quota) / static_cast<double>(*period);
}

int64_t StatusLine(std::string_view name) {
  return ParseKilobyteLine(ReadPseudoFile("/proc/self/status"), name).value_or(0);
}

}  // namespace

int64_t ResidentBytes() { return StatusLine("VmRSS"); }

int64_t PeakResidentBytes() { return StatusLine("VmHWM"); }

absl::Status ResetPeakResidentBytes() {
  std::FILE* file = std::fopen("/proc/self/clear_refs", "we");
  if (file == nullptr)
    return absl::UnavailableError("cannot open /proc/self/clear_refs");
  const bool written = std::fputs("5", file) >= 0;
  const bool closed = std::fclose(file) == 0;
  if (!written || !closed) {
    return absl::UnavailableError("/proc/self/clear_refs refused the reset of VmHWM");
  }
  return absl::OkStatus();
}

int64_t MemoryLimitBytes(const SystemRoot& root) {
  int64_t limit =
      ParseKilobyteLine(ReadPseudoFile(root.path + "/proc/meminfo"), "MemTotal")
          .value_or(std::numeric_limits<int64_t>::max());
  const CgroupPlace place = FindCgroup(root, "memory");
  const char* file = place.v2 ? "/memory.max" : "/memory.limit_in_bytes";
  ForEachGroup(place, [&](const std::string& folder) {
    const auto bytes = ParseNumber(ReadPseudoFile(folder + file));
    if (bytes.has_value() && *bytes > 0) limit = std::min(limit, *bytes);
  });
  for (const auto resource : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit own = {};
    if (getrlimit(resource, &own) != 0 || own.rlim_cur == RLIM_INFINITY) continue;
    limit = std::min(limit, static_cast<int64_t>(own.rlim_cur));
  }
  return limit;
}

int32_t UsableCpus(const SystemRoot& root) {
  double cpus = static_cast<double>(AffinityCpus());
  const CgroupPlace place = FindCgroup(root, "cpu");
  ForEachGroup(place, [&](const std::string& folder) {
    cpus = std::min(cpus, GroupCpus(place, folder).value_or(cpus));
  });
  return std::max(1, static_cast<int32_t>(std::ceil(cpus)));
}

void TuneMalloc() {
  constexpr int kMmapThreshold = 8 << 20;   // bytes; above the largest chunk
  constexpr int kTrimThreshold = 32 << 20;  // bytes free at an arena's end
  constexpr int kArenasMax = 4;
  mallopt(M_MMAP_THRESHOLD, kMmapThreshold);
  mallopt(M_TRIM_THRESHOLD, kTrimThreshold);
  mallopt(M_ARENA_MAX, kArenasMax);
}

void ReturnFreedMemory() { malloc_trim(0); }

std::optional<int64_t> ParseKilobyteLine(std::string_view text, std::string_view name) {
  const std::string prefix = std::string(name) + ":";
  for (absl::string_view line : absl::StrSplit(View(text), '\n')) {
    if (!absl::ConsumePrefix(&line, prefix)) continue;
    int64_t kilobytes = 0;
    if (!absl::ConsumeSuffix(&line, "kB") ||
        !absl::SimpleAtoi(absl::StripAsciiWhitespace(line), &kilobytes) ||
        kilobytes < 0 || kilobytes > std::numeric_limits<int64_t>::max() / 1024) {
      return std::nullopt;
    }
    return kilobytes * 1024;
  }
  return std::nullopt;
}

std::optional<double> ParseCpuMax(std::string_view text) {
  const std::vector<absl::string_view> parts =
      absl::StrSplit(absl::StripAsciiWhitespace(View(text)), ' ');
  int64_t quota = 0;
  int64_t period = 0;
  if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &quota) ||
      !absl::SimpleAtoi(parts[1], &period) || quota <= 0 || period <= 0) {
    return std::nullopt;
  }
  return static_cast<double>(quota) / static_cast<double>(period);
}

}  // namespace pbs::server
