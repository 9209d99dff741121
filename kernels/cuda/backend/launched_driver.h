// The kernels of a driver, on top of a launcher (plan/pipeline.h): that of CUDA or of
// the emulator.
#pragma once

#include "cuda/backend/driver.h"
#include "cuda/model/model_launches.h"
#include "cuda/plan/pipeline.h"

namespace pbs::cuda {

// `Launcher` also has Status Finish(), which is OK when every launch was OK.
template <class Launcher>
class LaunchedDriver : public Driver {
 public:
  Status Embed(const EmbedOp& op) final {
    return With([&](Launcher& launch) { EnqueueEmbed(op, launch); });
  }
  Status Rotations(const RotationsOp& op) final {
    return With([&](Launcher& launch) { EnqueueRotations(op, launch); });
  }
  Status RmsNorm(const RmsNormOp& op) final {
    return With([&](Launcher& launch) { EnqueueRmsNorm(op, launch); });
  }
  Status Qkv(const QkvOp& op) final {
    return With([&](Launcher& launch) { EnqueueQkv(op, launch); });
  }
  Status Logits(const LogitsOp& op) final {
    return With([&](Launcher& launch) { EnqueueLogits(op, launch); });
  }
  Status CopyRows(const CopyRowsOp& op) final {
    return With([&](Launcher& launch) { EnqueueCopyRows(op, launch); });
  }
  Status Gate(const GateRowsParams& params, int64_t rows) final {
    return With(
        [&](Launcher& launch) { launch.template Run<GateRows>(rows, 0, params); });
  }

  Status OrderKeys(const CudaAttentionPlan& plan, const RunParams& run) final {
    return With([&](Launcher& launch) {
      ForKernelsOf(plan, [&]<class Element, int kHeadDim>() {
        EnqueueOrder<Element, kHeadDim>(plan, run, launch);
      });
    });
  }
  Status MakeLists(const CudaAttentionPlan& plan, const RunParams& run) final {
    return With([&](Launcher& launch) {
      ForKernelsOf(plan, [&]<class Element, int kHeadDim>() {
        EnqueueLists<Element, kHeadDim>(plan, run, launch);
      });
    });
  }
  Status CorrectOutputs(const CudaAttentionPlan& plan, const RunParams& run) final {
    return With([&](Launcher& launch) {
      ForKernelsOf(plan, [&]<class Element, int kHeadDim>() {
        EnqueueCorrection<Element, kHeadDim>(plan, run, launch);
      });
    });
  }
  Status MeasureCoverage(const CudaAttentionPlan& plan, const RunParams& run) final {
    return With([&](Launcher& launch) {
      ForKernelsOf(plan, [&]<class Element, int kHeadDim>() {
        EnqueueCoverage<Element, kHeadDim>(plan, run.coverage, launch);
      });
    });
  }

 protected:
  virtual Launcher MakeLauncher() = 0;

  // Calls body.operator()<Element, kHeadDim>() for the plan's dtype and head dim.
  template <class Body>
  static void ForKernelsOf(const CudaAttentionPlan& plan, Body&& body) {
    if (plan.problem.dtype == DType::kBF16) {
      ForHeadDim<Bf16Element>(plan.geometry.head_dim, body);
    } else {
      ForHeadDim<F16Element>(plan.geometry.head_dim, body);
    }
  }

 private:
  template <class Element, class Body>
  static void ForHeadDim(int32_t head_dim, Body&& body) {
    switch (head_dim) {
      case 64:
        return body.template operator()<Element, 64>();
      case 96:
        return body.template operator()<Element, 96>();
      case 128:
        return body.template operator()<Element, 128>();
      default:
        return body.template operator()<Element, 256>();
    }
  }

  template <class Enqueue>
  Status With(Enqueue&& enqueue) {
    Launcher launch = MakeLauncher();
    enqueue(launch);
    return launch.Finish();
  }
};

}  // namespace pbs::cuda
