// Times linear layers of the CPU backend and prints one JSON line per case:
//   {"bench":"linear","rows":512,"in":4096,"out":4096,"weights":"bf16",
//    "compute":"f32","threads":1,"gflops_median":...,"gflops_best":...}
//
// usage: bench_linear [--threads N] [--repetitions N] [ROWSxINxOUT ...]
// Without shapes: the ones of docs/BENCHMARKS.md and a decode step.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "pbs/cpu_backend.h"

namespace pbs {
namespace {

struct Shape {
  long rows = 0, in = 0, out = 0;
};

struct Arguments {
  int threads = 1;
  int repetitions = 11;
  std::vector<Shape> shapes;
};

int Fail(const std::string& message) {
  std::fprintf(stderr, "bench_linear: %s\n", message.c_str());
  return 1;
}

bool ParseArguments(int argc, char** argv, Arguments& arguments) {
  for (int i = 1; i < argc; ++i) {
    Shape shape;
    if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
      arguments.threads = std::atoi(argv[++i]);
    } else if (std::strcmp(argv[i], "--repetitions") == 0 && i + 1 < argc) {
      arguments.repetitions = std::atoi(argv[++i]);
    } else if (std::sscanf(argv[i], "%ldx%ldx%ld", &shape.rows, &shape.in,
                           &shape.out) == 3) {
      arguments.shapes.push_back(shape);
    } else {
      return false;
    }
  }
  if (arguments.shapes.empty()) {
    arguments.shapes = {
        {512, 4096, 4096}, {2048, 2048, 8192}, {2048, 8192, 2048}, {1, 2048, 8192}};
  }
  return arguments.repetitions >= 1;
}

// Small random values: real products, no denormals.
RowReader RandomRows(DType dtype, int64_t in) {
  return [dtype, in](int64_t first, int64_t count, void* rows) {
    std::minstd_rand random(static_cast<uint32_t>(first + 1));
    std::vector<float> values(static_cast<size_t>(count * in));
    for (float& x : values) x = static_cast<float>(random() % 2001) * 1e-5f - 0.01f;
    ConvertElements(values.data(), DType::kF32, rows, dtype,
                    static_cast<int64_t>(values.size()));
    return OkStatus();
  };
}

Status RunCase(Backend& backend, const Shape& shape, DType weights, DType compute,
               const Arguments& arguments) {
  const LinearSpec spec = {.in_features = shape.in,
                           .out_features = shape.out,
                           .weight_dtype = weights,
                           .compute_dtype = compute,
                           .x_stride = shape.in,
                           .y_stride = shape.out};
  PBS_ASSIGN_OR_RETURN(auto linear,
                       backend.PackLinear(spec, RandomRows(weights, shape.in), {}));
  const int64_t element_bytes = DTypeBytes(compute);
  PBS_ASSIGN_OR_RETURN(Buffer x,
                       backend.Allocate(shape.rows * shape.in * element_bytes));
  PBS_ASSIGN_OR_RETURN(Buffer y,
                       backend.Allocate(shape.rows * shape.out * element_bytes));
  PBS_ASSIGN_OR_RETURN(Buffer workspace, backend.Allocate(backend.LinearWorkspaceBytes(
                                             *linear, shape.rows)));
  PBS_RETURN_IF_ERROR(RandomRows(compute, shape.in)(0, shape.rows, x.data()));
  std::vector<double> gflops;
  for (int i = 0; i <= arguments.repetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    PBS_RETURN_IF_ERROR(
        backend.Linear(*linear, x.data(), shape.rows, y.data(), workspace.workspace()));
    PBS_RETURN_IF_ERROR(backend.Synchronize());
    const std::chrono::duration<double> taken =
        std::chrono::steady_clock::now() - start;
    const double flops = 2.0 * static_cast<double>(shape.rows) *
                         static_cast<double>(shape.in) * static_cast<double>(shape.out);
    if (i > 0) gflops.push_back(flops / taken.count() * 1e-9);  // the first warms up
  }
  std::sort(gflops.begin(), gflops.end());
  std::printf(
      "{\"bench\":\"linear\",\"rows\":%ld,\"in\":%ld,\"out\":%ld,\"weights\":\"%s\","
      "\"compute\":\"%s\",\"threads\":%d,\"weight_bytes\":%ld,\"gflops_median\":%.1f,"
      "\"gflops_best\":%.1f}\n",
      shape.rows, shape.in, shape.out, DTypeName(weights), DTypeName(compute),
      arguments.threads, static_cast<long>(linear->bytes), gflops[gflops.size() / 2],
      gflops.back());
  std::fflush(stdout);
  return OkStatus();
}

int Main(int argc, char** argv) {
  Arguments arguments;
  if (!ParseArguments(argc, argv, arguments)) {
    return Fail(
        "usage: bench_linear [--threads N] [--repetitions N] [ROWSxINxOUT ...]");
  }
  auto wide = CreateCpuBackend(
      {.num_threads = arguments.threads, .compute = ComputePreference::kF32});
  if (!wide.ok()) return Fail(wide.status().ToString());
  auto narrow = CreateCpuBackend(
      {.num_threads = arguments.threads, .compute = ComputePreference::kBf16});
  for (const Shape& shape : arguments.shapes) {
    for (DType weights : {DType::kF32, DType::kBF16, DType::kF16}) {
      const Status status = RunCase(**wide, shape, weights, DType::kF32, arguments);
      if (!status.ok()) return Fail(status.ToString());
    }
    if (!narrow.ok()) continue;  // this CPU has no bf16 products
    const Status status =
        RunCase(**narrow, shape, DType::kBF16, DType::kBF16, arguments);
    if (!status.ok()) return Fail(status.ToString());
  }
  if (narrow.ok()) {
    std::printf("{\"bench\":\"linear_bf16_speedup\",\"measured\":%.3f}\n",
                (*narrow)->info().bf16_speedup);
  }
  return 0;
}

}  // namespace
}  // namespace pbs

int main(int argc, char** argv) { return pbs::Main(argc, argv); }
