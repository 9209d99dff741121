#include "client/cpp/bench/report.h"

#include <array>
#include <cstddef>
#include <fstream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"

namespace pbs::bench {
namespace {

using Json = nlohmann::ordered_json;

// What the data plane should reach, checksums on.
constexpr double kCpuSecondsPerGbMax = 0.45;
constexpr double kSharedRatioMin = 3;  // of raw TCP, from shared memory

// A peer, and the least ratio of our rate to its rate; 0: none is asked for.
struct Rival {
  const char* peer;
  double ratio_min;
};
constexpr std::array<Rival, 3> kRivals = {
    {{"tcp", 0.75}, {"protobuf", 0}, {"flight", 1.3}}};

std::string CpuModel() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

Json Machine() {
  return {{"cpu", CpuModel()}, {"cores", std::thread::hardware_concurrency()}};
}

Json ToJson(const Spread& spread) {
  return {{"median", spread.median}, {"min", spread.min}, {"max", spread.max}};
}

template <class Value>
Spread Over(const Cell& cell, Value&& value) {
  std::vector<double> values;
  for (size_t i = 0; i < cell.samples.size(); ++i) values.push_back(value(i));
  return SpreadOf(std::move(values));
}

double Rate(const Cell& cell, size_t round) {
  return static_cast<double>(cell.bytes) * 1e-9 / cell.samples[round].seconds;
}

bool IsShared(const Cell& cell) { return cell.label.peer.starts_with("shm"); }

bool HasChecksums(const Cell& cell) {
  return IsShared(cell) ||
         (cell.label.direction == "download" && cell.label.peer == "pbs");
}

// The same transfer by `peer`; null when that was not measured.
const Cell* CellOf(const std::string& peer, const Cell& cell,
                   const std::vector<Cell>& cells) {
  for (const Cell& other : cells) {
    if (other.label.peer == peer && other.label.direction == cell.label.direction &&
        other.label.streams == cell.label.streams) {
      return &other;
    }
  }
  return nullptr;
}

void AddCpu(const Cell& cell, Json& json) {
  const double gigabytes = static_cast<double>(cell.bytes) * 1e-9;
  const auto client = [&](size_t i) {
    return cell.samples[i].client_cpu_seconds / gigabytes;
  };
  json["client_cpu_seconds_per_gb"] = ToJson(Over(cell, client));
  json["cpu_seconds_per_gb"] = nullptr;
  for (const Sample& sample : cell.samples) {
    if (!sample.peer_cpu_seconds.has_value()) return;
  }
  json["cpu_seconds_per_gb"] = ToJson(Over(cell, [&](size_t i) {
    return client(i) + *cell.samples[i].peer_cpu_seconds / gigabytes;
  }));
}

// Names the goals that were missed.
void AddGoals(const Cell& cell, const std::vector<Cell>& cells, Json& json) {
  Json missed = Json::array();
  for (const auto& [peer, network_min] : kRivals) {
    const Cell* other = CellOf(peer, cell, cells);
    if (other == nullptr) continue;
    const bool is_tcp = std::string_view(peer) == "tcp";
    const double ratio_min = !IsShared(cell) ? network_min
                             : is_tcp        ? kSharedRatioMin
                                             : 0;
    const Spread ratio =
        Over(cell, [&](size_t i) { return Rate(cell, i) / Rate(*other, i); });
    const std::string name = absl::StrCat("ratio_to_", peer);
    json[name] = ToJson(ratio);
    if (ratio.median < ratio_min) missed.push_back(name);
  }
  const Json cpu = json["cpu_seconds_per_gb"];  // a copy: inserting moves the others
  if (cpu.is_object() && cpu["median"].get<double>() > kCpuSecondsPerGbMax) {
    missed.push_back("cpu_seconds_per_gb");
  }
  json["missed"] = std::move(missed);
}

Json ToJson(const Cell& cell, const std::vector<Cell>& cells) {
  Json json = {{"direction", cell.label.direction},
               {"peer", cell.label.peer},
               {"streams", cell.label.streams}};
  if (HasChecksums(cell)) json["checksums"] = cell.label.checksums;
  json["bytes"] = cell.bytes;
  json["gb_per_second"] = ToJson(Over(cell, [&](size_t i) { return Rate(cell, i); }));
  AddCpu(cell, json);
  if (cell.label.peer == "pbs" || IsShared(cell)) AddGoals(cell, cells, json);
  return json;
}

std::string SpreadText(const Json& spread) {
  if (!spread.is_object()) return "-";
  return absl::StrFormat("%.2f (%.2f-%.2f)", spread["median"].get<double>(),
                         spread["min"].get<double>(), spread["max"].get<double>());
}

std::string RatioText(const Json& cell, const std::string& peer) {
  const std::string name = absl::StrCat("ratio_to_", peer);
  return cell.contains(name) ? SpreadText(cell[name]) : "";
}

std::string GoalText(const Json& cell) {
  if (!cell.contains("missed")) return "";
  std::string text;
  for (const Json& goal : cell["missed"]) {
    absl::StrAppend(&text, text.empty() ? "missed: " : ", ", goal.get<std::string>());
  }
  return text.empty() ? "met" : text;
}

}  // namespace

nlohmann::ordered_json Report(const BenchOptions& options, const std::string& command,
                              const SessionResult& result) {
  Json report;
  report["benchmark"] = "data_plane";
  report["date"] =
      absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::Now(), absl::UTCTimeZone());
  report["command"] = command;
  report["commit"] = result.server.commit();
  report["machine"] = Machine();
  report["setting"] = {{"rounds", options.rounds},
                       {"chunk_bytes", options.chunk_bytes},
                       {"stream_window_bytes", options.stream_window_bytes}};
  if (result.kv.has_value()) {
    report["cache"] = {{"model", result.kv->model()},
                       {"layers", result.kv->num_layers()},
                       {"kv_heads", result.kv->num_kv_heads()},
                       {"head_dim", result.kv->head_dim()},
                       {"tokens", result.kv->num_tokens()},
                       {"dtype", v1::DType_Name(result.kv->dtype())}};
  }
  report["goals"] = {{"cpu_seconds_per_gb_max", kCpuSecondsPerGbMax},
                     {"shared_memory_ratio_to_tcp_min", kSharedRatioMin}};
  for (const auto& [peer, ratio_min] : kRivals) {
    if (ratio_min > 0) {
      report["goals"][absl::StrCat("ratio_to_", peer, "_min")] = ratio_min;
    }
  }
  report["cells"] = Json::array();
  for (const Cell& cell : result.cells) {
    report["cells"].push_back(ToJson(cell, result.cells));
  }
  return report;
}

std::string Table(const nlohmann::ordered_json& report) {
  std::string out = absl::StrFormat(
      "%s, %d cores, commit %s; medians (min-max) of %d rounds\n",
      report["machine"]["cpu"].get<std::string>(),
      report["machine"]["cores"].get<int>(), report["commit"].get<std::string>(),
      report["setting"]["rounds"].get<int>());
  constexpr char kLine[] = "%-9s %-13s %7s  %-6s %18s %18s %18s %18s %18s  %s\n";
  absl::StrAppendFormat(&out, kLine, "direction", "peer", "streams", "CRC32C", "GB/s",
                        "x TCP", "x protobuf", "x Flight", "CPU-s/GB", "goals");
  for (const Json& cell : report["cells"]) {
    const bool has_sums = cell.contains("checksums");
    absl::StrAppendFormat(&out, kLine, cell["direction"].get<std::string>(),
                          cell["peer"].get<std::string>(),
                          absl::StrCat(cell["streams"].get<int>()),
                          !has_sums                       ? "-"
                          : cell["checksums"].get<bool>() ? "on"
                                                          : "off",
                          SpreadText(cell["gb_per_second"]), RatioText(cell, "tcp"),
                          RatioText(cell, "protobuf"), RatioText(cell, "flight"),
                          SpreadText(cell["cpu_seconds_per_gb"]), GoalText(cell));
  }
  return out;
}

}  // namespace pbs::bench
