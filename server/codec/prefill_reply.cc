#include "server/codec/prefill_reply.h"

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "proto/wire/messages.h"
#include "server/codec/attention_options.h"
#include "server/codec/kv_format.h"
#include "server/codec/stage_seconds.h"

namespace pbs::server {
namespace {

static_assert(std::endian::native == std::endian::little, "logits travel as they lie");

template <class Target>
void EncodeTop(const std::vector<TokenScore>& top, Target* target) {
  for (const TokenScore& scored : top) {
    v1::TokenLogit& wire = *target->Add();
    wire.set_token_id(static_cast<uint32_t>(scored.token_id));
    wire.set_log_probability(scored.log_probability);
  }
}

void EncodeLayers(const std::vector<AttentionStats>& layers, v1::PrefillStats& wire) {
  double density = 0, coverage = 0, executed_flops = 0, dense_flops = 0;
  int32_t fallback_layers = 0;
  for (const AttentionStats& layer : layers) {
    wire.add_layer_density(layer.Density());
    wire.add_layer_method(EncodeMethod(layer.method_run));
    density += layer.Density();
    coverage += layer.coverage;
    executed_flops += layer.executed_flops;
    dense_flops += layer.dense_flops;
    fallback_layers += layer.dense_fallback ? 1 : 0;
  }
  const double count = layers.empty() ? 1 : static_cast<double>(layers.size());
  wire.set_density(density / count);
  wire.set_coverage(coverage / count);
  wire.set_executed_flops(executed_flops);
  wire.set_dense_flops(dense_flops);
  wire.set_fallback_layers(fallback_layers);
}

void EncodeHeads(const AttentionHeads& heads, v1::HeadStats& wire) {
  wire.mutable_density()->Add(heads.density.begin(), heads.density.end());
  wire.mutable_coverage()->Add(heads.coverage.begin(), heads.coverage.end());
  wire.mutable_guarded()->Add(heads.guarded.begin(), heads.guarded.end());
}

}  // namespace

v1::Done EncodeDone(const PrefillSpec& spec, const PrefillResult& result,
                    const PrefillFacts& facts, const BackendFacts& backend) {
  v1::Done done;
  done.set_first_token_id(static_cast<uint32_t>(result.first_token_id));
  EncodeTop(result.top_logits, done.mutable_top_logits());
  for (size_t i = 0; i < result.positions.size(); ++i) {
    v1::PositionLogits& position = *done.add_positions();
    position.set_position(static_cast<uint32_t>(spec.logit_positions[i]));
    EncodeTop(result.positions[i], position.mutable_top());
  }
  done.set_last_token_logits(result.last_token_logits.data(),
                             result.last_token_logits.size() * sizeof(float));
  done.set_model_digest(facts.model_digest);
  done.set_sparsity_digest(facts.sparsity_digest);

  v1::PrefillStats& stats = *done.mutable_stats();
  stats.set_prompt_tokens(facts.prompt_tokens);
  *stats.mutable_stages() = EncodeStages(result.stages);
  stats.mutable_stages()->set_send(facts.send_seconds);
  EncodeLayers(result.layers, stats);
  for (const AttentionHeads& heads : result.layer_heads) {
    EncodeHeads(heads, *stats.add_layer_heads());
  }
  stats.set_time_to_first_layer_seconds(result.time_to_first_layer_seconds);
  stats.set_total_seconds(result.total_seconds);
  stats.set_kv_copy_seconds(result.kv_copy_seconds);
  stats.set_backend(backend.name);
  stats.set_isa(backend.isa);
  stats.set_planned_bytes(facts.planned_bytes);
  if (HasThreshold(spec.attention.method) && spec.head_thresholds.empty()) {
    stats.set_threshold(spec.attention.threshold);
  }
  return done;
}

int64_t PrefillResultBytes(const PrefillSpec& spec, int32_t vocab_size,
                           int32_t num_layers) {
  // Result, message and encoded message: three copies. A scored token takes 16 bytes as
  // a message with its overhead, a layer's statistics a few hundred.
  constexpr int64_t kCopies = 3, kScoredBytes = 48, kLayerBytes = 512,
                    kFixed = 16 << 10;
  const auto rows = static_cast<int64_t>(spec.logit_positions.size()) + 1;
  const int64_t logits =
      spec.all_logits_last_token ? int64_t{vocab_size} * sizeof(float) : 0;
  return kCopies * (logits + rows * spec.top_logits * kScoredBytes +
                    num_layers * kLayerBytes) +
         kFixed;
}

grpc::ByteBuffer EncodeAdmitted(const v1::KvTicket* ticket, const Admission& admission,
                                const KvShape& shape, uint64_t epoch) {
  v1::PrefillEvent event;
  v1::Admitted& admitted = *event.mutable_admitted();
  if (ticket != nullptr) *admitted.mutable_ticket() = *ticket;
  admitted.set_queue_position(admission.queue_position);
  admitted.set_predicted_seconds(admission.predicted_seconds);
  v1::KvShape& wire_shape = *admitted.mutable_shape();
  wire_shape.set_num_layers(shape.num_layers);
  wire_shape.set_num_kv_heads(shape.num_kv_heads);
  wire_shape.set_head_dim(shape.head_dim);
  wire_shape.set_dtype(EncodeDType(shape.dtype));
  admitted.set_epoch(epoch);
  return wire::EncodeMessage(event);
}

grpc::ByteBuffer EncodeLayerDone(int32_t layer, double density, double seconds) {
  v1::PrefillEvent event;
  v1::LayerDone& wire = *event.mutable_layer();
  wire.set_index(layer);
  wire.set_density(density);
  wire.set_seconds(seconds);
  return wire::EncodeMessage(event);
}

grpc::ByteBuffer EncodeDoneEvent(const v1::Done& done) {
  v1::PrefillEvent event;
  *event.mutable_done() = done;
  return wire::EncodeMessage(event);
}

}  // namespace pbs::server
