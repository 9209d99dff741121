// The project's half of a side-by-side benchmark: prepares cases and times them one run
// at a time on request, so that a driver can interleave them with a peer's runs.
//
// stdin, one JSON object a line, such as {"do":"linear","name":"A","rows":512}: what to
// do, and what else there may be:
//   attention name, method, dtype (f32 | f16 | bf16), len, heads, kv_heads, head_dim,
//             data (structured | noise), isa, density (forces lists of that density),
//             options of the method by their names, such as threshold
//   linear    name, rows, in, out, dtype (f32 | bf16), repetitions in a run,
//             backend (cpu | cuda), module and cublaslt (files, for cuda)
//   model     path, compute (auto | f32 | bf16)
//   prefill   name, len, method, options of it, density, warmup (0 | 1)
//   recall    name, prompts (a file), method, threshold, order (identity), density
//   run       name -> wall and CPU seconds, and what the case measured
//   memory    -> peak of resident memory since the last call, and what is resident now
//   drop      name
// stdout, one JSON line per command: {"ok":true,...} or {"error":"..."}.
//
// usage: bench_worker [--threads N]
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>

#include "loader/cuda_module.h"
#include "pbs/cpu_backend.h"
#include "server/model/model.h"
#include "tests/bench/bench_case.h"

namespace pbs::bench {
namespace {

double ProcessCpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// A "Vm...:" line of /proc/self/status, in bytes.
int64_t StatusBytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field + ":"))
      return std::stoll(line.substr(field.size() + 1)) * 1024;
  }
  return 0;
}

class Worker {
 public:
  explicit Worker(int threads) : threads_(threads) {}

  // The reply's fields, or why there are none.
  StatusOr<std::string> Do(const std::string& command, const Words& words) {
    const std::string name = words.Text("name", "");
    if (command == "model") return LoadModel(words);
    if (command == "memory") return Memory();
    if (command == "drop") {
      cases_.erase(name);
      return std::string("\"ok\":true");
    }
    if (command == "run") return Time(name);
    if (command == "attention") return Keep(name, MakeAttentionCase(words, threads_));
    if (command == "linear") {
      PBS_ASSIGN_OR_RETURN(auto backend, MakeBackend(words));
      return Keep(name, MakeLinearCase(words, std::move(backend)));
    }
    if (command == "prefill" || command == "recall") {
      if (model_ == nullptr) return InvalidArgument(command + " needs a model first");
      return Keep(name, command == "prefill" ? MakePrefillCase(words, *model_)
                                             : MakeRecallCase(words, *model_));
    }
    return InvalidArgument("unknown command " + command);
  }

 private:
  StatusOr<std::unique_ptr<Backend>> MakeBackend(const Words& words) const {
    if (words.Text("backend", "cpu") == "cpu") {
      return CreateCpuBackend({.num_threads = threads_});
    }
    PBS_ASSIGN_OR_RETURN(const CudaModule module,
                         CudaModule::Load(words.Text("module", "")));
    return module.Create({.cublaslt = words.Text("cublaslt", "")});
  }

  StatusOr<std::string> LoadModel(const Words& words) {
    cases_.clear();
    model_.reset();
    PBS_ASSIGN_OR_RETURN(const ComputePreference compute,
                         ParseComputePreference(words.Text("compute", "auto")));
    PBS_ASSIGN_OR_RETURN(
        backend_, CreateCpuBackend({.num_threads = threads_, .compute = compute}));
    PBS_ASSIGN_OR_RETURN(model_, Model::Load(words.Text("path", ""), {}, *backend_));
    std::ostringstream out;
    out << "\"ok\":true,\"weight_bytes\":" << model_->weight_bytes()
        << ",\"compute\":\"" << DTypeName(model_->compute_dtype()) << "\",\"kv\":\""
        << DTypeName(model_->kv_dtype()) << "\"";
    return out.str();
  }

  StatusOr<std::string> Memory() {
    std::ostringstream out;
    out << "\"ok\":true,\"peak_bytes\":" << StatusBytes("VmHWM")
        << ",\"resident_bytes\":" << StatusBytes("VmRSS");
    std::ofstream("/proc/self/clear_refs") << "5";  // resets the peak
    return out.str();
  }

  StatusOr<std::string> Keep(const std::string& name, CaseOr made) {
    if (!made.ok()) return made.status();
    cases_[name] = *std::move(made);
    return std::string("\"ok\":true");
  }

  StatusOr<std::string> Time(const std::string& name) {
    const auto found = cases_.find(name);
    if (found == cases_.end()) return NotFound("no case " + name);
    const double cpu_begin = ProcessCpuSeconds();
    const auto begin = std::chrono::steady_clock::now();
    PBS_RETURN_IF_ERROR(found->second->Run());
    const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - begin;
    std::ostringstream out;
    out << "\"ok\":true,\"wall\":" << wall.count()
        << ",\"cpu\":" << ProcessCpuSeconds() - cpu_begin << found->second->Details();
    return out.str();
  }

  const int threads_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
  std::map<std::string, std::unique_ptr<Case>> cases_;
};

StatusOr<std::string> Answer(Worker& worker, const std::string& line) {
  const auto command = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!command.is_object()) return InvalidArgument("no JSON object: " + line);
  Words words;
  for (const auto& [key, value] : command.items()) {
    words.Set(key, value.is_string() ? value.get<std::string>() : value.dump());
  }
  return worker.Do(words.Text("do", ""), words);
}

std::string ErrorText(const Status& status) {
  const nlohmann::json error = {{"error", std::string(status.message())}};
  return error.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void Serve(int threads) {
  Worker worker(threads);
  for (std::string line; std::getline(std::cin, line);) {
    const StatusOr<std::string> fields = Answer(worker, line);
    std::cout << (fields.ok() ? "{" + *fields + "}" : ErrorText(fields.status()))
              << std::endl;
  }
}

}  // namespace
}  // namespace pbs::bench

int main(int argc, char** argv) {
  int threads = 1;
  if (argc == 3 && std::strcmp(argv[1], "--threads") == 0) threads = std::atoi(argv[2]);
  if ((argc != 1 && argc != 3) || threads < 1) {
    std::fprintf(stderr, "usage: bench_worker [--threads N]\n");
    return 2;
  }
  pbs::bench::Serve(threads);
  return 0;
}
