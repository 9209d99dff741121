// Whole runs of the CUDA pipeline on the emulator: inputs, launches, what they left.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "cuda/attention/attention_sm80.h"
#include "cuda/plan/cuda_plan.h"
#include "cuda/plan/cuda_report.h"
#include "cuda/plan/pipeline.h"
#include "tests/emulator/device_array.h"
#include "tests/emulator/machine.h"

namespace pbs::emulator {

// Packed inputs and outputs of a problem, normal values.
struct PackedInputs {
  PackedInputs(const AttentionProblem& problem, uint32_t seed)
      : geometry(MakeGeometry(problem)),
        q(geometry.num_heads * geometry.total_q * geometry.head_dim, true),
        k(geometry.num_kv_heads * geometry.total_k * geometry.head_dim, true),
        v(geometry.num_kv_heads * geometry.total_k * geometry.head_dim, true),
        o(geometry.num_heads * geometry.total_q * geometry.head_dim),
        lse(geometry.num_heads * geometry.total_q) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (DeviceArray<uint16_t>* array : {&q, &k, &v}) {
      for (int64_t i = 0; i < array->bytes() / 2; ++i) {
        const float x = 1.5f * normal(random);
        array->data()[i] =
            problem.dtype == DType::kBF16 ? ToBf16(x).bits : ToF16(x).bits;
      }
    }
  }

  AttentionTensors Tensors() {
    const int64_t dim = geometry.head_dim;
    AttentionTensors tensors;
    tensors.q = {q.data(), PackedLayout(geometry.total_q, dim)};
    tensors.k = {k.data(), PackedLayout(geometry.total_k, dim)};
    tensors.v = {v.data(), PackedLayout(geometry.total_k, dim)};
    tensors.o = {o.data(), PackedLayout(geometry.total_q, dim)};
    tensors.lse = {lse.data(), PackedLayout(geometry.total_q, 1)};
    return tensors;
  }
  void Allow() const {
    for (const DeviceArray<uint16_t>* array : {&q, &k, &v, &o}) array->Allow();
    lse.Allow();
  }

  AttentionGeometry geometry;
  DeviceArray<uint16_t> q, k, v, o;
  DeviceArray<float> lse;
};

// One run: the workspace it left, and how it ended.
template <class Element, int kHeadDim>
class PipelineRun {
 public:
  PipelineRun(const cuda::CudaAttentionPlan& plan, const AttentionTensors& tensors,
              uint32_t seed)
      : plan_(plan), workspace_(plan.workspace_bytes) {
    workspace_.Allow();
    const auto params =
        cuda::MakeRunParams(plan_, tensors, {workspace_.data(), workspace_.bytes()});
    if (!params.ok()) {
      launcher_.fault.what = params.status().ToString();
      return;
    }
    launcher_.seed = seed;
    cuda::EnqueueOrder<Element, kHeadDim>(plan_, *params, launcher_);
    cuda::EnqueueLists<Element, kHeadDim>(plan_, *params, launcher_);
    using Config = cuda::Sm80Config<Element, kHeadDim>;
    const cuda::Sm80Operands operands = {params->q, params->k, params->v};
    if (!launcher_.fault.ok()) return;
    launcher_.fault =
        Launch({.blocks = params->attention.num_tiles * Config::kParts,
                .threads = Config::kThreads,
                .resident_blocks = 2,
                .shared_bytes = sizeof(cuda::Sm80Shared<Config>),
                .seed = seed},
               [&] { cuda::AttendSm80<Config>(params->attention, operands); });
  }

  const Fault& fault() const { return launcher_.fault; }
  // As if all of it had taken a second.
  Status Report(const ReportRequest& request, AttentionReport* report) const {
    PBS_RETURN_IF_ERROR(cuda::TellSummary(plan_, workspace_.data() + plan_.summary_at,
                                          /*total_seconds=*/1, report));
    cuda::TellRequested(plan_, workspace_.data(), request, report);
    return OkStatus();
  }
  int launches() const { return launcher_.launches; }
  const std::byte* workspace() const { return workspace_.data(); }

 private:
  const cuda::CudaAttentionPlan& plan_;
  DeviceArray<std::byte> workspace_;
  EmulatorLauncher launcher_;
};

}  // namespace pbs::emulator
