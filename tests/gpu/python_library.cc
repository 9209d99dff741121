// Attention on a device as plain functions for ctypes (pbs_library.py): it is timed in
// one process with its peers, on their stream, their tensors and memory of their
// allocator. Pointers are device pointers of contiguous [heads, tokens, head_dim].
// What fails gives null or a status other than 0; PbsError() says why.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "tests/gpu/session.h"

#define PBS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string& LastError() {
  static auto& text = *new std::string;
  return text;
}

struct Opened {
  std::unique_ptr<pbs::gpu::Session> session;
  std::unique_ptr<pbs::AttentionPlan> plan;
  pbs::Workspace lent;
};

Opened& Of(void* handle) { return *static_cast<Opened*>(handle); }

int32_t Told(const pbs::Status& status) {
  if (!status.ok()) LastError() = status.ToString();
  return status.ok() ? 0 : 1;
}

}  // namespace

PBS_EXPORT const char* PbsError() { return LastError().c_str(); }

// Null behind the last one.
PBS_EXPORT const char* PbsVariantName(int32_t index) {
  const auto& names = pbs::cuda::kAttentionVariantNames;
  const auto at = static_cast<size_t>(index);
  return at < names.size() ? names[at] : nullptr;
}

// `method` is of pbs::Method, `variant` of pbs::cuda::AttentionVariant.
PBS_EXPORT void* PbsOpen(void* stream, int32_t variant, int32_t num_heads,
                         int32_t num_kv_heads, int32_t head_dim, int32_t num_tokens,
                         bool bf16, int32_t method, int32_t segment_size,
                         float threshold, bool query_head_scope, bool dense_fallback,
                         bool given_order, bool given_lists) {
  auto session = pbs::gpu::Session::Open(
      static_cast<pbs::cuda::AttentionVariant>(variant), stream);
  if (Told(session.status()) != 0) return nullptr;
  pbs::AttentionProblem problem;
  problem.shape = {num_heads, num_kv_heads, head_dim, {{num_tokens, num_tokens}}};
  problem.dtype = bf16 ? pbs::DType::kBF16 : pbs::DType::kF16;
  problem.options = {
      .method = static_cast<pbs::Method>(method),
      .segment_size = segment_size,
      .threshold = threshold,
      .scope = query_head_scope ? pbs::Scope::kQueryHead : pbs::Scope::kKvHead,
      .use_given_order = given_order,
      .use_given_lists = given_lists,
      .dense_fallback = dense_fallback};
  auto plan = (*session)->attention().Plan(problem);
  if (Told(plan.status()) != 0) return nullptr;
  return new Opened{*std::move(session), *std::move(plan), {}};
}

PBS_EXPORT int64_t PbsWorkspaceBytes(void* handle) {
  return Of(handle).plan->workspace_bytes;
}

// Before anything runs: so many bytes, 256-byte aligned.
PBS_EXPORT void PbsSetWorkspace(void* handle, void* workspace) {
  Of(handle).lent = {workspace, Of(handle).plan->workspace_bytes};
}

PBS_EXPORT void PbsLend(const void* data, int64_t bytes) {
  pbs::gpu::Lend(data, bytes);
}

PBS_EXPORT void PbsClose(void* handle) { delete &Of(handle); }

// Enqueues. `lse` is f32; `order` [order heads, tokens]; lists have `num_rows` rows.
PBS_EXPORT int32_t PbsRun(void* handle, const void* q, const void* k, const void* v,
                          void* o, void* lse, const int32_t* order,
                          const int64_t* begin, const uint16_t* count,
                          const uint16_t* indices, int64_t num_rows) {
  Opened& opened = Of(handle);
  const pbs::AttentionGeometry& g = opened.plan->geometry;
  pbs::AttentionTensors t = pbs::gpu::PackedTensors(g, q, k, v, o, lse);
  t.order = {order, pbs::PackedLayout(g.total_k, 1)};
  t.lists = {num_rows, begin, count, /*num_masked=*/nullptr, indices};
  return Told(opened.session->attention().Run(*opened.plan, t, opened.lent, {}));
}

// Where a kernel of this process hangs, or "" (DescribeHang()).
PBS_EXPORT const char* PbsHang(void* handle) {
  LastError() = pbs::gpu::DescribeHang(Of(handle).session->device(),
                                       Of(handle).plan->geometry.head_dim);
  return LastError().c_str();
}

// Waits. Executed over causal blocks, as published densities count; seconds of
// ordering, selection, attention; whether it fell back.
PBS_EXPORT int32_t PbsReadReport(void* handle, double* figures) {
  Opened& opened = Of(handle);
  pbs::AttentionReport report;
  const pbs::Status status =
      opened.session->attention().ReadReport(*opened.plan, opened.lent, {}, &report);
  const pbs::AttentionStats& stats = report.stats;
  figures[0] = stats.CausalRatio();
  figures[1] = stats.permute_seconds;
  figures[2] = stats.select_seconds;
  figures[3] = stats.attend_seconds;
  figures[4] = stats.dense_fallback ? 1 : 0;
  return Told(status);
}
