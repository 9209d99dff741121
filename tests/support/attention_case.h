// Attention problems with seeded inputs for tests, in any dtype and layout. The inputs
// have structure, so that selection has blocks to select.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "pbs/attention.h"

namespace pbs::testing_support {

// Standard normals of a seed, from the first. Drawing them takes most of a case's time,
// and many cases have the same seed, so each thread keeps its drawn values.
class Normals {
 public:
  explicit Normals(uint32_t seed) : stream_(StreamOf(seed)) {}

  float Next() {
    std::vector<float>& drawn = stream_.drawn;
    if (next_ == drawn.size()) drawn.push_back(stream_.normal(stream_.random));
    return drawn[next_++];
  }

 private:
  struct Stream {
    explicit Stream(uint32_t seed) : random(seed) {}
    std::mt19937 random;
    std::normal_distribution<float> normal;
    std::vector<float> drawn;
  };
  static Stream& StreamOf(uint32_t seed) {
    thread_local std::map<uint32_t, Stream> streams;
    return streams.try_emplace(seed, seed).first->second;
  }

  Stream& stream_;
  size_t next_ = 0;
};

// Owns the tensors of one problem. q, k, v are made in f32 and rounded to the problem's
// dtype; keys share a direction with every query by a token importance of standard
// deviation 2 in logits, so that permutation and selection matter. Thresholds of heads
// are 0.6, 1, 0.2, 0.9, again and again.
class AttentionCase {
 public:
  enum class Layout { kPacked, kTokenMajor };

  AttentionCase(AttentionProblem problem, uint32_t seed,
                Layout layout = Layout::kPacked)
      : problem_(std::move(problem)), geometry_(MakeGeometry(problem_)) {
    const int64_t dim = geometry_.head_dim;
    const auto layout_of = [&](int64_t heads, int64_t total) {
      return layout == Layout::kPacked ? PackedLayout(total, dim)
                                       : TokenMajorLayout(heads * dim, dim);
    };
    q_layout_ = layout_of(geometry_.num_heads, geometry_.total_q);
    kv_layout_ = layout_of(geometry_.num_kv_heads, geometry_.total_k);
    FillInputs(seed);
    if (!problem_.has_head_thresholds) return;
    constexpr float kThresholds[] = {0.6f, 1.0f, 0.2f, 0.9f};
    for (int32_t head = 0; head < geometry_.num_heads; ++head) {
      head_thresholds_.push_back(kThresholds[head % 4]);
    }
  }

  const AttentionProblem& problem() const { return problem_; }
  const AttentionGeometry& geometry() const { return geometry_; }

  AttentionTensors Tensors() {
    AttentionTensors tensors;
    tensors.q = {q_.data(), q_layout_};
    tensors.k = {k_.data(), kv_layout_};
    tensors.v = {v_.data(), kv_layout_};
    tensors.o = {o_.data(), q_layout_};
    tensors.lse = {lse_.data(), PackedLayout(geometry_.total_q, 1)};
    tensors.head_thresholds = head_thresholds_;
    return tensors;
  }

  // Output of (head, query of the whole batch), after a run.
  float O(int32_t head, int64_t query, int32_t d) const {
    const int64_t at = head * q_layout_.head_stride + query * q_layout_.row_stride + d;
    return VisitDType(problem_.dtype, [&](auto element) {
      return ToFloat(reinterpret_cast<const decltype(element)*>(o_.data())[at]);
    });
  }
  float Lse(int32_t head, int64_t query) const {
    return lse_[head * geometry_.total_q + query];
  }
  // Calls body(data, bytes, whether it holds values) for each array of Tensors().
  template <class Body>
  void ForEachArray(Body&& body) const {
    for (const auto* array : {&q_, &k_, &v_}) {
      body(array->data(), static_cast<int64_t>(array->size()), true);
    }
    body(o_.data(), static_cast<int64_t>(o_.size()), false);
    body(lse_.data(), static_cast<int64_t>(lse_.size() * sizeof(float)), false);
  }
  const std::vector<uint8_t>& o_bytes() const { return o_; }
  std::vector<uint8_t>& q_bytes() { return q_; }
  std::vector<uint8_t>& k_bytes() { return k_; }
  std::vector<uint8_t>& v_bytes() { return v_; }
  const RowLayout& kv_layout() const { return kv_layout_; }

 private:
  void FillInputs(uint32_t seed) {
    Normals normals(seed);
    const int32_t dim = geometry_.head_dim;
    const float root = std::sqrt(static_cast<float>(dim));
    std::vector<float> direction(static_cast<size_t>(dim));
    for (float& x : direction) x = normals.Next() / root;
    const auto fill = [&](std::vector<uint8_t>& bytes, const RowLayout& layout,
                          int32_t heads, int64_t rows, auto&& importance) {
      const int64_t bytes_of = DTypeBytes(problem_.dtype);
      bytes.resize(static_cast<size_t>(heads * rows * dim * bytes_of));
      std::vector<float> row(static_cast<size_t>(dim));
      for (int32_t head = 0; head < heads; ++head) {
        for (int64_t r = 0; r < rows; ++r) {
          const float height = importance();
          for (int32_t d = 0; d < dim; ++d) {
            row[d] = normals.Next() + height * direction[d];
          }
          const int64_t at = head * layout.head_stride + r * layout.row_stride;
          ConvertElements(row.data(), DType::kF32, bytes.data() + at * bytes_of,
                          problem_.dtype, dim);
        }
      }
    };
    fill(q_, q_layout_, geometry_.num_heads, geometry_.total_q, [] { return 1.0f; });
    fill(k_, kv_layout_, geometry_.num_kv_heads, geometry_.total_k,
         [&] { return 2.0f * root * normals.Next(); });
    fill(v_, kv_layout_, geometry_.num_kv_heads, geometry_.total_k,
         [] { return 0.0f; });
    o_.assign(q_.size(), 0xFF);  // NaN: every element must be written
    lse_.assign(static_cast<size_t>(geometry_.num_heads * geometry_.total_q), NAN);
  }

  AttentionProblem problem_;
  AttentionGeometry geometry_;
  RowLayout q_layout_;
  RowLayout kv_layout_;
  std::vector<uint8_t> q_, k_, v_, o_;
  std::vector<float> lse_;
  std::vector<float> head_thresholds_;
};

// Runs a problem on a backend with a workspace of exactly the planned size, poisoned.
struct BackendRun {
  Status status;
  AttentionReport report;
  int64_t workspace_bytes = 0;
};

inline BackendRun RunOn(AttentionBackend& backend, const AttentionProblem& problem,
                        const AttentionTensors& tensors,
                        const RunControl& control = {}) {
  BackendRun run;
  auto plan = backend.Plan(problem);
  if (!plan.ok()) {
    run.status = plan.status();
    return run;
  }
  run.workspace_bytes = (*plan)->workspace_bytes;
  std::vector<uint8_t> memory(static_cast<size_t>(run.workspace_bytes) + 64, 0xFF);
  const auto aligned = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
  const Workspace workspace = {reinterpret_cast<void*>(aligned), run.workspace_bytes};
  run.status = backend.Run(**plan, tensors, workspace, control);
  if (run.status.ok()) {
    run.status = backend.ReadReport(**plan, workspace, {.order = true, .lists = true},
                                    &run.report);
  }
  return run;
}

}  // namespace pbs::testing_support
