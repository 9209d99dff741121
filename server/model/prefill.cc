#include "server/model/prefill.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "pbs/check.h"

namespace pbs {
namespace {

constexpr int64_t kWord = 4;  // bytes of a float or a token id

// Moments of a layer that are timed. Layers take turns in two sets of marks: one
// is read while the other is set.
enum LayerMark { kBegin, kKvReady, kAttended, kEnd, kLayerMarks };
static_assert(kTimeMarks >= 2 * kLayerMarks);
int MarkOf(int32_t layer, LayerMark mark) { return layer % 2 * kLayerMarks + mark; }
// Of the embedding, which are read before layer 1 sets its own.
constexpr int kEmbedBegin = kLayerMarks;
constexpr int kEmbedEnd = kLayerMarks + 1;

const void* Offset(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * DTypeBytes(dtype);
}
void* Offset(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * DTypeBytes(dtype);
}

Status CheckInputs(const Model& model, const PrefillPlan& plan,
                   const PrefillInputs& inputs, const KvCache& cache,
                   Workspace workspace) {
  const PrefillProblem& problem = plan.problem;
  const auto text = [](int64_t value) { return std::to_string(value); };
  if (static_cast<int64_t>(inputs.tokens.size()) != problem.num_tokens) {
    return InvalidArgument(text(static_cast<int64_t>(inputs.tokens.size())) +
                           " tokens were given; num_tokens is " +
                           text(problem.num_tokens));
  }
  for (size_t i = 0; i < inputs.tokens.size(); ++i) {
    if (inputs.tokens[i] < 0 || inputs.tokens[i] >= model.config().vocab_size) {
      return InvalidArgument("the token at position " + text(static_cast<int64_t>(i)) +
                             " is outside [0, " + text(model.config().vocab_size - 1) +
                             "]");
    }
  }
  if (cache.shape() != model.kv_shape(cache.shape().capacity)) {
    return InvalidArgument("the KV cache was made for another model or dtype");
  }
  if (problem.past_len + problem.num_tokens > cache.shape().capacity) {
    return InvalidArgument(
        "past_len + num_tokens " + text(problem.past_len + problem.num_tokens) +
        " exceeds the KV cache's capacity " + text(cache.shape().capacity));
  }
  if (problem.past_len > cache.num_tokens()) {
    return InvalidArgument("past_len " + text(problem.past_len) +
                           " exceeds the tokens in the KV cache, " +
                           text(cache.num_tokens()));
  }
  if (problem.past_len > 0 && cache.resident_layers() < cache.shape().num_layers) {
    return InvalidArgument("past_len " + text(problem.past_len) +
                           " needs all layers in the KV cache, which holds " +
                           text(cache.resident_layers()));
  }
  if (inputs.queries != nullptr && !inputs.queries->layers().empty() &&
      (inputs.queries->shape() != model.query_shape(problem.num_tokens) ||
       problem.prompt_tokens.size() > 1 || problem.past_len > 0)) {
    return InvalidArgument("the captured queries were made for another run");
  }
  if (workspace.bytes < plan.workspace_bytes) {
    return ResourceExhausted("the workspace has " + text(workspace.bytes) +
                             " bytes; the plan asks for " + text(plan.workspace_bytes));
  }
  return OkStatus();
}

}  // namespace

PrefillRun::PrefillRun(const Model& model, const PrefillPlan& plan,
                       const PrefillInputs& inputs, KvCache& cache, Workspace workspace)
    : model_(model),
      plan_(plan),
      backend_(model.backend()),
      cache_(cache),
      order_(inputs.order),
      lists_(inputs.lists),
      queries_(inputs.queries) {
  const PrefillRegions& regions = plan.regions;
  const auto at = [&](int64_t offset) -> void* {
    return static_cast<std::byte*>(workspace.data) + offset;
  };
  const auto floats = [&](int64_t offset) { return static_cast<float*>(at(offset)); };
  const auto words = [&](int64_t offset) { return static_cast<int32_t*>(at(offset)); };
  at_.residual = floats(regions.residual);
  at_.queries = at(regions.queries);
  at_.attended = at(regions.attended);
  if (plan.memory.pooled_queries > 0) {
    at_.pooled_queries = floats(regions.pooled_queries);
    PBS_CHECK(plan.row_tile == plan.problem.num_tokens ||
              plan.row_tile >= plan.attention->geometry.block_size);
  }
  at_.cosines = floats(regions.cosines);
  at_.sines = floats(regions.sines);
  at_.attention = {at(regions.attention), plan.memory.attention};
  at_.tile = at(regions.tile);
  at_.wide_tile = at(regions.wide_tile);
  at_.linear = {at(regions.linear), plan.memory.linear};
  at_.logit_rows = words(regions.logit_rows);
  at_.logit_residual = floats(regions.logit_residual);
  at_.logit_normed = floats(regions.logit_normed);
  at_.logit_attended = at(regions.logit_attended);
  at_.logits = floats(regions.logits);
  at_.tokens = words(regions.tokens);
}

StatusOr<std::unique_ptr<PrefillRun>> PrefillRun::Start(const Model& model,
                                                        const PrefillPlan& plan,
                                                        const PrefillInputs& inputs,
                                                        KvCache& cache,
                                                        Workspace workspace) {
  PBS_RETURN_IF_ERROR(CheckInputs(model, plan, inputs, cache, workspace));
  auto run = std::unique_ptr<PrefillRun>(
      new PrefillRun(model, plan, inputs, cache, workspace));
  PBS_RETURN_IF_ERROR(run->Embed(inputs.tokens));
  cache.set_num_tokens(plan.problem.past_len);  // what lies behind is written over
  return run;
}

PrefillRun::~PrefillRun() {
  // The next run must find no report of this one. Errors have no receiver any more.
  AttentionReport report;
  for (; reports_under_way_ > 0; --reports_under_way_) {
    static_cast<void>(backend_.FinishReport(*plan_.attention, &report));
  }
}

Status PrefillRun::Embed(std::span<const int32_t> tokens) {
  const ModelConfig& config = model_.config();
  const auto rows = static_cast<int64_t>(tokens.size());
  PBS_RETURN_IF_ERROR(backend_.MarkTime(kEmbedBegin));
  PBS_RETURN_IF_ERROR(
      backend_.Upload(plan_.problem.logit_rows.data(), at_.logit_rows,
                      static_cast<int64_t>(plan_.problem.logit_rows.size()) * kWord));
  PBS_RETURN_IF_ERROR(backend_.Upload(tokens.data(), at_.tokens, rows * kWord));
  PBS_RETURN_IF_ERROR(backend_.Embed({.table = model_.weights().embedding.data(),
                                      .table_dtype = model_.weights().embedding_dtype,
                                      .tokens = at_.tokens,
                                      .rows = rows,
                                      .hidden = config.hidden_size,
                                      .residual = at_.residual}));
  const int64_t pairs = config.head_dim / 2;
  int64_t first_row = 0;
  for (int32_t prompt_rows : plan_.problem.prompt_tokens) {
    PBS_RETURN_IF_ERROR(backend_.Rotations({.frequencies = model_.inverse_frequencies(),
                                            .factor = config.rope.attention_factor,
                                            .first_position = plan_.problem.past_len,
                                            .rows = prompt_rows,
                                            .pairs = pairs,
                                            .cosines = at_.cosines + first_row * pairs,
                                            .sines = at_.sines + first_row * pairs}));
    first_row += prompt_rows;
  }
  return backend_.MarkTime(kEmbedEnd);
}

int32_t PrefillRun::LayersUnderWayMax(const Backend& backend) {
  return backend.info().host_memory ? 1 : kReportsUnderWayMax;
}

bool PrefillRun::layers_done() const {
  return layers_finished_ == model_.config().num_layers;
}

Status PrefillRun::CheckStop(const RunControl& control) const {
  if (control.stop == nullptr || !control.stop->load(std::memory_order_relaxed)) {
    return OkStatus();
  }
  return Cancelled("prefill stopped in layer " + std::to_string(next_layer_) + " of " +
                   std::to_string(model_.config().num_layers));
}

Status PrefillRun::RunLayer(PrefillObserver* observer, const RunControl& control) {
  const int32_t num_layers = model_.config().num_layers;
  PBS_CHECK(next_layer_ < num_layers && !failed_);
  failed_ = true;  // until the end is reached
  PBS_RETURN_IF_ERROR(CallLayer(observer, control));
  ++next_layer_;
  if (next_layer_ == 1) {
    PBS_ASSIGN_OR_RETURN(embed_seconds_,
                         backend_.SecondsBetween(kEmbedBegin, kEmbedEnd));
  }
  const int32_t ahead = next_layer_ == num_layers ? 0 : LayersUnderWayMax(backend_) - 1;
  while (layers_finished_ < next_layer_ - ahead) {
    PBS_RETURN_IF_ERROR(FinishLayer(observer));
  }
  failed_ = false;
  return OkStatus();
}

Status PrefillRun::CatchUp(PrefillObserver* observer) {
  PBS_CHECK(!failed_);
  failed_ = true;
  while (layers_finished_ < next_layer_) PBS_RETURN_IF_ERROR(FinishLayer(observer));
  failed_ = false;
  return OkStatus();
}

Status PrefillRun::CallLayer(PrefillObserver* observer, const RunControl& control) {
  const auto mark = [this](LayerMark moment) {
    return backend_.MarkTime(MarkOf(next_layer_, moment));
  };
  PBS_RETURN_IF_ERROR(mark(kBegin));
  PBS_RETURN_IF_ERROR(RunQkv(next_layer_, control));
  PBS_RETURN_IF_ERROR(CaptureQueries(next_layer_));
  PBS_RETURN_IF_ERROR(mark(kKvReady));
  if (observer != nullptr) observer->OnKvReady(next_layer_);
  PBS_RETURN_IF_ERROR(RunAttention(next_layer_, control));
  PBS_RETURN_IF_ERROR(mark(kAttended));
  PBS_RETURN_IF_ERROR(RunMlp(next_layer_, control));
  return mark(kEnd);
}

Status PrefillRun::FinishLayer(PrefillObserver* observer) {
  LayerReport report;
  report.layer = layers_finished_;
  AttentionReport attention;
  --reports_under_way_;
  PBS_RETURN_IF_ERROR(backend_.FinishReport(*plan_.attention, &attention));
  report.attention = attention.stats;
  report.heads = std::move(attention.heads);
  const auto seconds = [&](LayerMark from, LayerMark to) {
    return backend_.SecondsBetween(MarkOf(report.layer, from),
                                   MarkOf(report.layer, to));
  };
  PBS_ASSIGN_OR_RETURN(report.qkv_seconds, seconds(kBegin, kKvReady));
  PBS_ASSIGN_OR_RETURN(report.mlp_seconds, seconds(kAttended, kEnd));
  PBS_ASSIGN_OR_RETURN(report.seconds, seconds(kBegin, kEnd));
  ++layers_finished_;
  if (layers_done()) {
    cache_.set_num_tokens(plan_.problem.past_len + plan_.problem.num_tokens);
  }
  if (observer != nullptr) observer->OnLayerDone(report);
  return OkStatus();
}

int64_t PrefillRun::TileEnd(int64_t row) const {
  const int64_t end = std::min<int64_t>(row + plan_.row_tile, plan_.problem.num_tokens);
  if (at_.pooled_queries == nullptr || end == plan_.problem.num_tokens) return end;
  return end - (plan_.problem.past_len + end) % plan_.attention->geometry.block_size;
}

Status PrefillRun::RunQkv(int32_t layer_index, const RunControl& control) {
  const ModelConfig& config = model_.config();
  const LayerWeights& layer = model_.weights().layers[static_cast<size_t>(layer_index)];
  const DType compute = model_.compute_dtype();
  const DType kv = model_.kv_dtype();
  const int64_t hidden = config.hidden_size;
  const AttentionGeometry& geometry = plan_.attention->geometry;
  const int64_t first_block = plan_.problem.past_len / geometry.block_size;
  for (int64_t row = 0; row < plan_.problem.num_tokens; row = TileEnd(row)) {
    PBS_RETURN_IF_ERROR(CheckStop(control));
    const int64_t rows = TileEnd(row) - row;
    PBS_RETURN_IF_ERROR(backend_.RmsNorm({.x = at_.residual + row * hidden,
                                          .weight = layer.attention_norm,
                                          .epsilon = config.rms_norm_epsilon,
                                          .rows = rows,
                                          .cols = hidden,
                                          .y = at_.tile,
                                          .y_dtype = compute}));
    PBS_RETURN_IF_ERROR(
        backend_.Linear(*layer.qkv, at_.tile, rows, at_.wide_tile, at_.linear));
    const int64_t half = config.head_dim / 2;
    const int64_t position = plan_.problem.past_len + row;
    const int64_t cache_offset = position * config.head_dim;
    float* pooled = at_.pooled_queries;
    if (pooled != nullptr) {
      pooled +=
          (position / geometry.block_size - first_block) * config.attention_features();
    }
    PBS_RETURN_IF_ERROR(backend_.Qkv(
        {.qkv = at_.wide_tile,
         .qkv_dtype = compute,
         .rows = rows,
         .num_heads = config.num_heads,
         .num_kv_heads = config.num_kv_heads,
         .head_dim = config.head_dim,
         .q_norm = layer.q_norm,
         .k_norm = layer.k_norm,
         .epsilon = config.rms_norm_epsilon,
         .cosines = at_.cosines + row * half,
         .sines = at_.sines + row * half,
         .kv_dtype = kv,
         .q = Offset(at_.queries, row * config.attention_features(), kv),
         .k = Offset(cache_.k(layer_index), cache_offset, kv),
         .v = Offset(cache_.v(layer_index), cache_offset, kv),
         .kv_head_stride = cache_.head_stride(),
         .pooled_queries = pooled,
         .block_size = geometry.block_size,
         .row_in_block = static_cast<int32_t>(position % geometry.block_size)}));
  }
  return OkStatus();
}

Status PrefillRun::CaptureQueries(int32_t layer) {
  void* target = queries_ == nullptr ? nullptr : queries_->data(layer);
  if (target == nullptr) return OkStatus();
  return backend_.Download(at_.queries, target, queries_->shape().layer_bytes());
}

Status PrefillRun::RunAttention(int32_t layer, const RunControl& control) {
  const ModelConfig& config = model_.config();
  const RowLayout token_major =
      TokenMajorLayout(config.attention_features(), config.head_dim);
  AttentionTensors tensors;
  tensors.q = {at_.queries, token_major};
  tensors.k = {cache_.k(layer), cache_.layout()};
  tensors.v = {cache_.v(layer), cache_.layout()};
  tensors.o = {at_.attended, token_major};
  tensors.order = order_;
  tensors.lists = lists_;
  tensors.pooled_queries = at_.pooled_queries;
  if (const auto thresholds = plan_.problem.head_thresholds; !thresholds.empty()) {
    const auto heads = static_cast<size_t>(config.num_heads);
    tensors.head_thresholds = thresholds.subspan(layer * heads, heads);
  }
  PBS_RETURN_IF_ERROR(backend_.Run(*plan_.attention, tensors, at_.attention, control));
  PBS_RETURN_IF_ERROR(backend_.StartReport(*plan_.attention, at_.attention));
  ++reports_under_way_;
  return OkStatus();
}

Status PrefillRun::RunMlp(int32_t layer_index, const RunControl& control) {
  const ModelConfig& config = model_.config();
  const LayerWeights& layer = model_.weights().layers[static_cast<size_t>(layer_index)];
  if (layer_index + 1 < config.num_layers) {
    return RunMlpRows(layer, at_.residual, at_.attended, plan_.problem.num_tokens,
                      control);
  }
  const auto rows = static_cast<int64_t>(plan_.problem.logit_rows.size());
  PBS_RETURN_IF_ERROR(backend_.CopyRows({.source = at_.residual,
                                         .row_index = at_.logit_rows,
                                         .rows = rows,
                                         .cols = config.hidden_size,
                                         .target = at_.logit_residual}));
  PBS_RETURN_IF_ERROR(backend_.CopyRows({.source = at_.attended,
                                         .source_dtype = model_.kv_dtype(),
                                         .row_index = at_.logit_rows,
                                         .rows = rows,
                                         .cols = config.attention_features(),
                                         .target = at_.logit_attended,
                                         .target_dtype = model_.kv_dtype()}));
  return RunMlpRows(layer, at_.logit_residual, at_.logit_attended, rows, control);
}

Status PrefillRun::RunMlpRows(const LayerWeights& layer, float* residual,
                              const void* attended, int64_t rows,
                              const RunControl& control) {
  const ModelConfig& config = model_.config();
  const DType compute = model_.compute_dtype();
  const DType kv = model_.kv_dtype();
  const int64_t hidden = config.hidden_size;
  const int64_t heads = config.attention_features();
  for (int64_t row = 0; row < rows; row += plan_.row_tile) {
    PBS_RETURN_IF_ERROR(CheckStop(control));
    const int64_t count = std::min<int64_t>(plan_.row_tile, rows - row);
    float* stream = residual + row * hidden;
    const void* input = Offset(attended, row * heads, kv);
    if (kv != compute) {
      PBS_RETURN_IF_ERROR(backend_.CopyRows({.source = input,
                                             .source_dtype = kv,
                                             .rows = count,
                                             .cols = heads,
                                             .target = at_.tile,
                                             .target_dtype = compute}));
      input = at_.tile;
    }
    PBS_RETURN_IF_ERROR(
        backend_.Linear(*layer.output, input, count, stream, at_.linear));
    PBS_RETURN_IF_ERROR(backend_.RmsNorm({.x = stream,
                                          .weight = layer.mlp_norm,
                                          .epsilon = config.rms_norm_epsilon,
                                          .rows = count,
                                          .cols = hidden,
                                          .y = at_.tile,
                                          .y_dtype = compute}));
    PBS_RETURN_IF_ERROR(
        backend_.Linear(*layer.gate_up, at_.tile, count, at_.wide_tile, at_.linear));
    PBS_RETURN_IF_ERROR(
        backend_.Linear(*layer.down, at_.wide_tile, count, stream, at_.linear));
  }
  return OkStatus();
}

Status PrefillRun::ComputeLogits() {
  PBS_CHECK(layers_done());
  const ModelConfig& config = model_.config();
  const ModelWeights& weights = model_.weights();
  const auto rows = static_cast<int64_t>(plan_.problem.logit_rows.size());
  PBS_RETURN_IF_ERROR(backend_.RmsNorm({.x = at_.logit_residual,
                                        .weight = weights.final_norm,
                                        .epsilon = config.rms_norm_epsilon,
                                        .rows = rows,
                                        .cols = config.hidden_size,
                                        .y = at_.logit_normed,
                                        .y_dtype = DType::kF32}));
  return backend_.Logits({.x = at_.logit_normed,
                          .weight = weights.head_data(),
                          .weight_dtype = weights.head_dtype,
                          .rows = rows,
                          .hidden = config.hidden_size,
                          .vocab = config.vocab_size,
                          .y = at_.logits});
}

Status PrefillRun::ReadLogits(int32_t index, std::span<float> logits) {
  const int64_t vocab = model_.config().vocab_size;
  PBS_CHECK(index >= 0 &&
            index < static_cast<int64_t>(plan_.problem.logit_rows.size()) &&
            static_cast<int64_t>(logits.size()) == vocab);
  return backend_.Download(at_.logits + index * vocab, logits.data(), vocab * kWord);
}

}  // namespace pbs
