// One linear layer.
#include <cstddef>
#include <sstream>
#include <vector>

#include "pbs/backend.h"
#include "tests/bench/bench_case.h"

namespace pbs::bench {
namespace {

class LinearBench final : public Case {
 public:
  static CaseOr Create(const Words& words, std::unique_ptr<Backend> backend) {
    auto bench = std::unique_ptr<LinearBench>(new LinearBench(std::move(backend)));
    PBS_RETURN_IF_ERROR(bench->Prepare(words));
    return CaseOr(std::move(bench));
  }

  Status Run() override {
    for (int32_t i = 0; i < repetitions_; ++i) {
      PBS_RETURN_IF_ERROR(backend_->Linear(*linear_, x_.data(), rows_, y_.data(),
                                           workspace_.workspace()));
    }
    std::byte first{};  // of the result: it is there when this is
    return backend_->Download(y_.data(), &first, 1);
  }

  std::string Details() const override {
    std::ostringstream out;
    out << ",\"flops\":" << 2.0 * static_cast<double>(rows_) * in_ * out_ * repetitions_
        << ",\"compute\":\"" << DTypeName(linear_->spec.compute_dtype)
        << "\",\"weight_bytes\":" << linear_->bytes;
    return out.str();
  }

 private:
  explicit LinearBench(std::unique_ptr<Backend> backend)
      : backend_(std::move(backend)) {}

  Status Prepare(const Words& words) {
    PBS_ASSIGN_OR_RETURN(const DType stored, ParseDType(words.Text("dtype", "f32")));
    rows_ = words.Integer("rows", 512);
    in_ = words.Integer("in", 4096);
    out_ = words.Integer("out", 4096);
    repetitions_ = words.Integer("repetitions", 1);
    const DType compute = backend_->ComputeDType(stored);
    const LinearSpec spec = {.in_features = in_,
                             .out_features = out_,
                             .weight_dtype = stored,
                             .compute_dtype = compute,
                             .x_stride = in_,
                             .y_stride = out_};
    const auto rows = [&](DType dtype) {
      return [this, dtype](int64_t first, int64_t count, void* target) {
        std::vector<float> values(static_cast<size_t>(count * in_));
        uint32_t state = static_cast<uint32_t>(first) * 2654435761u + 1;
        for (float& x : values) {
          state = state * 1664525u + 1013904223u;
          x = static_cast<float>(state >> 16) * 0x1p-16f - 0.5f;
        }
        ConvertElements(values.data(), DType::kF32, target, dtype,
                        static_cast<int64_t>(values.size()));
        return OkStatus();
      };
    };
    PBS_ASSIGN_OR_RETURN(linear_, backend_->PackLinear(spec, rows(stored), {}));
    PBS_ASSIGN_OR_RETURN(x_, backend_->Allocate(rows_ * in_ * DTypeBytes(compute)));
    PBS_ASSIGN_OR_RETURN(y_, backend_->Allocate(rows_ * out_ * DTypeBytes(compute)));
    PBS_ASSIGN_OR_RETURN(workspace_, backend_->Allocate(backend_->LinearWorkspaceBytes(
                                         *linear_, rows_)));
    std::vector<std::byte> x(static_cast<size_t>(x_.bytes()));
    PBS_RETURN_IF_ERROR(rows(compute)(0, rows_, x.data()));
    PBS_RETURN_IF_ERROR(backend_->Upload(x.data(), x_.data(), x_.bytes()));
    return Run();  // warms up
  }

  const std::unique_ptr<Backend> backend_;
  std::unique_ptr<PackedLinear> linear_;
  Buffer x_, y_, workspace_;
  int64_t rows_ = 0, in_ = 0, out_ = 0;
  int32_t repetitions_ = 1;
};

}  // namespace

CaseOr MakeLinearCase(const Words& words, std::unique_ptr<Backend> backend) {
  return LinearBench::Create(words, std::move(backend));
}

}  // namespace pbs::bench
