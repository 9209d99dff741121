#include "cpu/linear_calibration.h"

#include <algorithm>
#include <chrono>
#include <dnnl.hpp>
#include <limits>
#include <vector>

#include "cpu/linear_matmul.h"

namespace pbs::cpu {
namespace {

constexpr int64_t kDepth = 1024;
constexpr int kPanels = 8;  // distinct, so that one does not stay in the first cache
constexpr int kRepetitions = 7;

// One dtype's operands: zeros multiply as fast as anything.
class Contender {
 public:
  Status Prepare(const dnnl::engine& engine, DType operands) {
    PBS_ASSIGN_OR_RETURN(
        kernels_, MatmulKernels::Create(engine, operands, kDepth, kPanelCols, kDepth));
    x_.resize(kRowBlock * kDepth);
    tile_.resize(kRowBlock * kPanelCols);
    scratch_.resize(static_cast<size_t>(kernels_->scratch_bytes()));
    panels_.resize(static_cast<size_t>(kPanels * kernels_->panel_bytes()));
    for (int i = 0; i < kPanels; ++i) {
      memories_.push_back(
          kernels_->PanelMemory(panels_.data() + i * kernels_->panel_bytes()));
    }
    return OkStatus();
  }

  Status Time() {
    const auto start = std::chrono::steady_clock::now();
    for (const dnnl::memory& panel : memories_) {
      PBS_RETURN_IF_ERROR(kernels_->Multiply(x_.data(), NextPiece(kRowBlock, 0), panel,
                                             tile_.data(), scratch_.data()));
    }
    const std::chrono::duration<double> taken =
        std::chrono::steady_clock::now() - start;
    best_ = std::min(best_, taken.count());
    return OkStatus();
  }

  double best_seconds() const { return best_; }

 private:
  std::unique_ptr<MatmulKernels> kernels_;
  std::vector<float> x_, tile_;
  std::vector<char> scratch_, panels_;
  std::vector<dnnl::memory> memories_;
  double best_ = std::numeric_limits<double>::infinity();
};

}  // namespace

double MeasureBf16Speedup() {
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  Contender f32;
  Contender bf16;
  if (!f32.Prepare(engine, DType::kF32).ok()) return 0;
  if (!bf16.Prepare(engine, DType::kBF16).ok()) return 0;
  for (int i = 0; i < kRepetitions; ++i) {  // interleaved: both see the same noise
    if (!f32.Time().ok() || !bf16.Time().ok()) return 0;
  }
  return f32.best_seconds() / bf16.best_seconds();
}

}  // namespace pbs::cpu
