// Whole runs of the CUDA pipeline on the emulator: inputs, launches and results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/attention/attention_sm80.h"
#include "cuda/plan/cuda_plan.h"
#include "cuda/plan/cuda_report.h"
#include "cuda/plan/pipeline.h"
#include "emulator/device_array.h"
#include "emulator/machine.h"

namespace pbs::emulator {

// Inputs and outputs of a problem, with normal values. They are packed, or every
// sequence is as long as the longest, with NaN after its end.
struct PipelineInputs {
  enum class Layout { kPacked, kStrided };

  PipelineInputs(const AttentionProblem& problem, uint32_t seed,
                 Layout layout = Layout::kPacked)
      : geometry(MakeGeometry(problem)),
        q_layout(LayoutOf(layout, geometry.num_heads, geometry.total_q, true)),
        kv_layout(LayoutOf(layout, geometry.num_kv_heads, geometry.total_k, false)),
        q(Elements(geometry.num_heads, true), true),
        k(Elements(geometry.num_kv_heads, false), true),
        v(Elements(geometry.num_kv_heads, false), true),
        o(Elements(geometry.num_heads, true)),
        lse(geometry.num_heads * geometry.total_q) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](DeviceArray<uint16_t>& array, const RowLayout& rows,
                          int32_t heads, bool of_queries) {
      for (int32_t head = 0; head < heads; ++head) {
        for (size_t n = 0; n < geometry.sequences.size(); ++n) {
          const SequenceGeometry& s = geometry.sequences[n];
          for (int32_t row = 0; row < (of_queries ? s.q_len : s.k_len); ++row) {
            const int64_t at = rows.Offset(
                static_cast<int64_t>(n), of_queries ? s.q_begin : s.k_begin, head, row);
            for (int32_t d = 0; d < geometry.head_dim; ++d) {
              const float x = 1.5f * normal(random);
              array.data()[at + d] =
                  problem.dtype == DType::kBF16 ? ToBf16(x).bits : ToF16(x).bits;
            }
          }
        }
      }
    };
    fill(q, q_layout, geometry.num_heads, true);
    fill(k, kv_layout, geometry.num_kv_heads, false);
    fill(v, kv_layout, geometry.num_kv_heads, false);
    if (!problem.has_head_thresholds) return;
    constexpr float kThresholds[] = {0.2f, 0.7f, 1.0f};
    for (int32_t head = 0; head < geometry.num_heads; ++head) {
      head_thresholds.push_back(kThresholds[head % 3]);
    }
  }

  AttentionTensors Tensors() {
    AttentionTensors tensors;
    tensors.q = {q.data(), q_layout};
    tensors.k = {k.data(), kv_layout};
    tensors.v = {v.data(), kv_layout};
    tensors.o = {o.data(), q_layout};
    tensors.lse = {lse.data(), PackedLayout(geometry.total_q, 1)};
    tensors.head_thresholds = head_thresholds;
    return tensors;
  }
  // For methods whose scores must differ much: adds to the queries and keys of each
  // block a random row, which is larger in the fastest eighth of the rotary pairs, by
  // factors that differ between heads and sequences. Scores of blocks then differ, and
  // the shares of bands in a head are not those of another one. It does nothing where
  // scores of keys are rounded: the rounding of large scores would decide the order.
  // With the mean correction the values of blocks differ too, by 0.6 in all columns, so
  // that their means matter.
  void MakeBlocksDiffer(const AttentionProblem& problem, uint32_t seed) {
    const DType dtype = problem.dtype;
    const Scorer scorer = TraitsOf(problem.options.method).scorer;
    std::mt19937 random(seed + 1000);
    std::normal_distribution<float> normal;
    const auto add = [&](DeviceArray<uint16_t>& array, const RowLayout& rows,
                         int32_t heads, bool of_queries) {
      std::vector<float> added(static_cast<size_t>(geometry.head_dim));
      for (int32_t head = 0; head < heads; ++head) {
        for (size_t n = 0; n < geometry.sequences.size(); ++n) {
          const SequenceGeometry& s = geometry.sequences[n];
          const auto factor = static_cast<float>(
              1 << (head + static_cast<int32_t>(n) + (of_queries ? 1 : 0)) % 3);
          for (int32_t row = 0; row < (of_queries ? s.q_len : s.k_len); ++row) {
            for (int32_t d = 0; d < geometry.head_dim && row % 128 == 0; ++d) {
              const bool fast =
                  &array != &v && d % (geometry.head_dim / 2) < geometry.head_dim / 16;
              added[d] = (fast ? factor : 0.6f) * normal(random);
            }
            const int64_t at = rows.Offset(
                static_cast<int64_t>(n), of_queries ? s.q_begin : s.k_begin, head, row);
            for (int32_t d = 0; d < geometry.head_dim; ++d) {
              uint16_t& bits = array.data()[at + d];
              bits = dtype == DType::kBF16 ? ToBf16(ToFloat(bf16{bits}) + added[d]).bits
                                           : ToF16(ToFloat(f16{bits}) + added[d]).bits;
            }
          }
        }
      }
    };
    if (problem.options.mean_correction) {
      add(v, kv_layout, geometry.num_kv_heads, false);
      return;  // the means of keys are rounded: where they are large, logits are far
               // off
    }
    if (scorer == Scorer::kNone || scorer == Scorer::kMeans) return;
    if (problem.options.scope == Scope::kQueryHead) return;
    add(q, q_layout, geometry.num_heads, true);
    add(k, kv_layout, geometry.num_kv_heads, false);
  }
  // NaN, Inf and -Inf in turn in the queries, keys and values of one sequence, of bf16.
  void Spoil(int32_t sequence) {
    constexpr uint16_t kBad[] = {0x7FC0, 0x7F80, 0xFF80};
    const SequenceGeometry& s = geometry.sequences[sequence];
    const auto spoil = [&](DeviceArray<uint16_t>& array, const RowLayout& rows,
                           int32_t heads, int64_t before, int32_t num_rows) {
      for (int32_t head = 0; head < heads; ++head) {
        for (int32_t row = 0; row < num_rows; ++row) {
          const int64_t at = rows.Offset(sequence, before, head, row);
          for (int32_t d = 0; d < geometry.head_dim; ++d) {
            array.data()[at + d] = kBad[(row + d) % 3];
          }
        }
      }
    };
    spoil(q, q_layout, geometry.num_heads, s.q_begin, s.q_len);
    spoil(k, kv_layout, geometry.num_kv_heads, s.k_begin, s.k_len);
    spoil(v, kv_layout, geometry.num_kv_heads, s.k_begin, s.k_len);
  }

  void Allow() const {
    for (const DeviceArray<uint16_t>* array : {&q, &k, &v, &o}) array->Allow();
    lse.Allow();
  }

  AttentionGeometry geometry;
  RowLayout q_layout, kv_layout;
  DeviceArray<uint16_t> q, k, v, o;  // NaN where there is no row
  DeviceArray<float> lse;
  std::vector<float> head_thresholds;  // where the problem has them: 0.2, 0.7, 1, ...

 private:
  int64_t Longest(bool of_queries) const {
    int64_t longest = 0;
    for (const SequenceGeometry& s : geometry.sequences) {
      longest = std::max<int64_t>(longest, of_queries ? s.q_len : s.k_len);
    }
    return longest;
  }
  RowLayout LayoutOf(Layout layout, int64_t heads, int64_t total,
                     bool of_queries) const {
    return layout == Layout::kPacked
               ? PackedLayout(total, geometry.head_dim)
               : DenseBatchLayout(heads, Longest(of_queries), geometry.head_dim);
  }
  int64_t Elements(int64_t heads, bool of_queries) const {
    const RowLayout& rows = of_queries ? q_layout : kv_layout;
    if (rows.sequence_stride == RowLayout::kPacked) return heads * rows.head_stride;
    return static_cast<int64_t>(geometry.sequences.size()) * rows.sequence_stride;
  }
};

// One run: its workspace and its status.
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
    cuda::EnqueueCorrection<Element, kHeadDim>(plan_, *params, launcher_);
    cuda::EnqueueCoverage<Element, kHeadDim>(plan_, params->coverage, launcher_);
  }

  const Fault& fault() const { return launcher_.fault; }
  // The report of the run, as if the run had taken one second.
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
