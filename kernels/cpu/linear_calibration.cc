#include "cpu/linear_calibration.h"

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <dnnl.hpp>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/linear_matmul.h"

namespace pbs::cpu {
namespace {

constexpr int64_t kDepth = 1024;
constexpr int kPanels = 8;  // distinct, so that one does not stay in the first cache
// A sample takes a fraction of a millisecond: most of them run undisturbed even where
// other processes want the CPU, and the best one counts.
constexpr int kSamples = 48;
// A gain must show every time, so that a busy moment cannot switch the dtype.
constexpr int kConfirmations = 3;

double ThreadCpuSeconds() {
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

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

  // Seconds of one product with panel `sample` modulo kPanels; infinite on an error.
  double Time(int sample) {
    const double start = ThreadCpuSeconds();
    const Status status =
        kernels_->Multiply(x_.data(), NextPiece(kRowBlock, 0),
                           memories_[sample % kPanels], tile_.data(), scratch_.data());
    return status.ok() ? ThreadCpuSeconds() - start
                       : std::numeric_limits<double>::infinity();
  }

 private:
  std::unique_ptr<MatmulKernels> kernels_;
  std::vector<float> x_, tile_;
  std::vector<char> scratch_, panels_;
  std::vector<dnnl::memory> memories_;
};

double Speedup(Contender& f32, Contender& bf16) {
  double f32_best = std::numeric_limits<double>::infinity();
  double bf16_best = f32_best;
  for (int i = 0; i < kSamples; ++i) {  // interleaved: both see the same noise
    f32_best = std::min(f32_best, f32.Time(i));
    bf16_best = std::min(bf16_best, bf16.Time(i));
  }
  return f32_best / bf16_best;
}

}  // namespace

double MeasureBf16Speedup() {
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  Contender f32;
  Contender bf16;
  if (!f32.Prepare(engine, DType::kF32).ok()) return 0;
  if (!bf16.Prepare(engine, DType::kBF16).ok()) return 0;
  double speedup = Speedup(f32, bf16);
  for (int i = 1; i < kConfirmations && speedup >= kBf16SpeedupMin; ++i) {
    speedup = std::min(speedup, Speedup(f32, bf16));
  }
  return speedup;
}

}  // namespace pbs::cpu
