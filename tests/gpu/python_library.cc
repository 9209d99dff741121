// The CUDA backend as plain functions for ctypes: the suite times it in one process
// with its peers, on their stream, their tensors and memory of their allocator. All
// pointers are device pointers of contiguous [heads, tokens, head_dim] tensors.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "cuda/backend/attention_variants.h"

namespace {

std::string& LastError() {
  static auto& text = *new std::string;
  return text;
}

struct Opened {
  std::unique_ptr<pbs::AttentionBackend> backend;
  std::unique_ptr<pbs::AttentionPlan> plan;
  pbs::Workspace lent;
};

bool Succeeds(const pbs::Status& status) {
  if (!status.ok()) LastError() = status.ToString();
  return status.ok();
}

}  // namespace

extern "C" {

struct PbsSetting {
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t num_tokens;
  int32_t bf16;
  int32_t method;  // of pbs::Method
  int32_t segment_size;
  float threshold;
  int32_t query_head_scope;
  int32_t dense_fallback;
  int32_t given_order;
  int32_t given_lists;
  int32_t variant;  // of pbs::cuda::AttentionVariant
};

struct PbsTensors {
  const void* q;
  const void* k;
  const void* v;
  void* o;
  void* lse;             // f32, or null
  const int32_t* order;  // [order heads, tokens]
  const int64_t* begin;  // lists
  const uint16_t* count;
  const uint16_t* indices;
  int64_t num_rows;
};

struct PbsReport {
  double density;
  double permute_seconds;
  double select_seconds;
  double attend_seconds;
  int64_t workspace_bytes;
  int32_t fell_back;
};

const char* PbsError() { return LastError().c_str(); }

// Null on failure: see PbsError().
void* PbsOpen(const PbsSetting* setting, void* stream) {
  auto backend = pbs::cuda::CreateAttentionVariant(
      {.stream = stream}, static_cast<pbs::cuda::AttentionVariant>(setting->variant));
  if (!Succeeds(backend.status())) return nullptr;
  pbs::AttentionProblem problem;
  problem.shape = {setting->num_heads,
                   setting->num_kv_heads,
                   setting->head_dim,
                   {{setting->num_tokens, setting->num_tokens}}};
  problem.dtype = setting->bf16 != 0 ? pbs::DType::kBF16 : pbs::DType::kF16;
  problem.options.method = static_cast<pbs::Method>(setting->method);
  problem.options.segment_size = setting->segment_size;
  problem.options.threshold = setting->threshold;
  problem.options.scope =
      setting->query_head_scope != 0 ? pbs::Scope::kQueryHead : pbs::Scope::kKvHead;
  problem.options.dense_fallback = setting->dense_fallback != 0;
  problem.options.use_given_order = setting->given_order != 0;
  problem.options.use_given_lists = setting->given_lists != 0;
  auto plan = (*backend)->Plan(problem);
  if (!Succeeds(plan.status())) return nullptr;
  auto opened = std::make_unique<Opened>();
  opened->backend = *std::move(backend);
  opened->plan = *std::move(plan);
  return opened.release();
}

int64_t PbsWorkspaceBytes(void* handle) {
  return static_cast<Opened*>(handle)->plan->workspace_bytes;
}

// Before anything runs: so many bytes, 256-byte aligned.
void PbsLendWorkspace(void* handle, void* workspace) {
  auto& opened = *static_cast<Opened*>(handle);
  opened.lent = {workspace, opened.plan->workspace_bytes};
}

void PbsClose(void* handle) { delete static_cast<Opened*>(handle); }

// 0 when everything was enqueued.
int32_t PbsRun(void* handle, const PbsTensors* tensors) {
  auto& opened = *static_cast<Opened*>(handle);
  const pbs::AttentionGeometry& g = opened.plan->geometry;
  pbs::AttentionTensors t;
  t.q = {tensors->q, pbs::PackedLayout(g.total_q, g.head_dim)};
  t.k = {tensors->k, pbs::PackedLayout(g.total_k, g.head_dim)};
  t.v = {tensors->v, pbs::PackedLayout(g.total_k, g.head_dim)};
  t.o = {tensors->o, pbs::PackedLayout(g.total_q, g.head_dim)};
  t.lse = {tensors->lse, pbs::PackedLayout(g.total_q, 1)};
  t.order = {tensors->order, pbs::PackedLayout(g.total_k, 1)};
  t.lists = {.num_rows = tensors->num_rows,
             .begin = tensors->begin,
             .count = tensors->count,
             .num_masked = nullptr,
             .indices = tensors->indices};
  return Succeeds(opened.backend->Run(*opened.plan, t, opened.lent, {})) ? 0 : 1;
}

// Waits. 0 when the run was good.
int32_t PbsReadReport(void* handle, PbsReport* report) {
  auto& opened = *static_cast<Opened*>(handle);
  pbs::AttentionReport full;
  if (!Succeeds(opened.backend->ReadReport(*opened.plan, opened.lent, {}, &full))) {
    return 1;
  }
  *report = {full.stats.Density(),         full.stats.permute_seconds,
             full.stats.select_seconds,    full.stats.attend_seconds,
             opened.plan->workspace_bytes, full.stats.dense_fallback ? 1 : 0};
  return 0;
}

}  // extern "C"
