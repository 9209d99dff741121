#include "server/telemetry/process_metrics.h"

#include <dirent.h>
#include <prometheus/client_metric.h>
#include <prometheus/metric_type.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "server/base/process.h"
#include "server/telemetry/metric_names.h"

namespace pbs::server {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

std::optional<double> CpuSeconds() {
  timespec time = {};
  if (clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time) != 0) return std::nullopt;
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Empty when the file cannot be read.
std::string ReadPseudoFile(const char* path) {
  constexpr size_t kBytesMax = 64 << 10;
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return "";
  std::string text(kBytesMax, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file));
  std::fclose(file);
  return text;
}

// When the machine started, and how long after that this process did.
std::optional<double> StartSeconds() {
  const std::string machine = ReadPseudoFile("/proc/stat");
  const size_t at = machine.find("btime ");
  if (at == std::string::npos) return std::nullopt;
  const double booted = std::strtod(machine.c_str() + at + 6, nullptr);
  // The name in parentheses may hold anything; from its end on the words are numbers.
  std::string own = ReadPseudoFile("/proc/self/stat");
  own.erase(0, own.rfind(')') + 1);
  constexpr int kStartWord = 19;  // "starttime", the 22nd of proc(5)
  std::istringstream words(own);
  std::string word;
  for (int i = 0; i <= kStartWord; ++i) words >> word;
  if (!words) return std::nullopt;
  const auto ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  return booted + std::strtod(word.c_str(), nullptr) / ticks;
}

std::optional<double> ResidentMemory() {
  const int64_t bytes = ResidentBytes();
  if (bytes == 0) return std::nullopt;
  return static_cast<double>(bytes);
}

std::optional<double> OpenDescriptors() {
  DIR* folder = opendir("/proc/self/fd");
  if (folder == nullptr) return std::nullopt;
  double count = -1;  // the folder's own
  while (const dirent* entry = readdir(folder))
    count += entry->d_name[0] != '.' ? 1 : 0;
  closedir(folder);
  return count;
}

std::optional<double> DescriptorsMax() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return std::nullopt;
  return static_cast<double>(limit.rlim_cur);
}

void Add(const MetricName& metric, MetricType type, std::optional<double> value,
         std::vector<MetricFamily>& families) {
  if (!value.has_value()) return;
  ClientMetric told;
  (type == MetricType::Counter ? told.counter.value : told.gauge.value) = *value;
  families.push_back({metric.name, metric.help, type, {told}});
}

}  // namespace

std::vector<MetricFamily> ProcessMetrics::Collect() const {
  std::vector<MetricFamily> families;
  Add(kProcessMemoryName, MetricType::Gauge, ResidentMemory(), families);
  Add(kProcessCpuName, MetricType::Counter, CpuSeconds(), families);
  Add(kProcessStartName, MetricType::Gauge, StartSeconds(), families);
  Add(kProcessDescriptorsName, MetricType::Gauge, OpenDescriptors(), families);
  Add(kProcessDescriptorsMaxName, MetricType::Gauge, DescriptorsMax(), families);
  return families;
}

}  // namespace pbs::server
