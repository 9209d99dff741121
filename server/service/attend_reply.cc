#include "server/service/attend_reply.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "proto/wire/messages.h"
#include "server/base/attention_options.h"
#include "server/service/stage_seconds.h"
#include "server/transfer/kv_format.h"

namespace pbs::server {
namespace {

int64_t ElementBytes(v1::DType dtype) {
  switch (dtype) {
    case v1::I64:
      return 8;
    case v1::F32:
    case v1::I32:
      return 4;
    default:
      return 2;
  }
}

// [heads, tokens of all sequences] -> [batch, heads, tokens].
std::vector<int32_t> BySequence(const AttentionGeometry& g,
                                const std::vector<int32_t>& packed) {
  std::vector<int32_t> order(packed.size());
  auto out = order.begin();
  for (const SequenceGeometry& s : g.sequences) {
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      const auto row = packed.begin() + head * g.total_k + s.k_begin;
      out = std::copy(row, row + s.k_len, out);
    }
  }
  return order;
}

}  // namespace

AttendReply::AttendReply(const AttendSpec& spec, const BackendFacts& backend,
                         int32_t chunk_bytes, AttendResult result)
    : chunk_bytes_(chunk_bytes), held_(std::make_shared<Held>()) {
  held_->result = std::move(result);
  const AttentionGeometry g = MakeGeometry(spec.problem);
  const auto batch = static_cast<int64_t>(g.sequences.size());
  const int64_t heads = g.num_heads, dim = g.head_dim;
  std::vector<int64_t> rows =
      spec.packed ? std::vector<int64_t>{heads, g.total_q}
                  : std::vector<int64_t>{batch, heads, g.sequences[0].q_len};
  if (spec.want_lse) AddPart(v1::LSE, v1::F32, rows, held_->result.lse.data());
  if (spec.want_order) AddOrder(spec, g);
  if (spec.want_lists) AddLists(g);
  if (spec.want_o) {
    rows.push_back(dim);
    AddPart(v1::O, EncodeDType(spec.problem.dtype), rows, held_->result.o.data());
  }
  header_.mutable_header();
  FillStats(backend);
}

void AttendReply::AddPart(v1::TensorName tensor, v1::DType dtype,
                          std::vector<int64_t> shape, const void* data) {
  v1::TensorSpec& spec = *header_.mutable_header()->add_tensors();
  spec.set_tensor(tensor);
  spec.set_dtype(dtype);
  int64_t bytes = ElementBytes(dtype);
  for (int64_t axis : shape) {
    spec.add_shape(axis);
    bytes *= axis;
  }
  parts_.push_back({tensor, static_cast<const std::byte*>(data), bytes});
}

void AttendReply::AddOrder(const AttendSpec& spec, const AttentionGeometry& g) {
  std::vector<int32_t>& order = held_->result.report.order;
  const int64_t heads = g.num_order_heads;
  if (spec.packed) {
    AddPart(v1::ORDER, v1::I32, {heads, g.total_k}, order.data());
    return;
  }
  const auto batch = static_cast<int64_t>(g.sequences.size());
  if (batch > 1) order = BySequence(g, order);
  AddPart(v1::ORDER, v1::I32, {batch, heads, g.sequences[0].k_len}, order.data());
}

void AttendReply::AddLists(const AttentionGeometry& g) {
  const BlockLists& lists = held_->result.report.lists;
  const int64_t num_rows = g.total_query_blocks * g.num_heads;
  std::vector<int64_t>& offsets = held_->list_offsets;
  offsets = lists.begin;
  offsets.push_back(static_cast<int64_t>(lists.indices.size()));
  AddPart(v1::LIST_OFFSETS, v1::I64, {num_rows + 1}, offsets.data());
  AddPart(v1::LIST_INDICES, v1::U16, {static_cast<int64_t>(lists.indices.size())},
          lists.indices.data());
}

void AttendReply::FillStats(const BackendFacts& backend) {
  const AttendResult& result = held_->result;
  const AttentionStats& stats = result.report.stats;
  v1::AttendStats& wire = *stats_.mutable_stats();
  wire.set_method_run(EncodeMethod(stats.method_run));
  wire.set_dense_fallback(stats.dense_fallback);
  wire.set_density(stats.Density());
  wire.set_lower_density(stats.LowerDensity());
  for (double density : result.report.head_density) wire.add_head_density(density);
  wire.set_executed_blocks(stats.executed_blocks);
  wire.set_causal_blocks(stats.causal_blocks);
  wire.set_executed_flops(stats.executed_flops);
  wire.set_dense_flops(stats.dense_flops);
  wire.set_coverage(stats.coverage);
  wire.set_coverage_rows(stats.coverage_rows);
  *wire.mutable_stages() = EncodeStages(result.stages);
  for (const AttendIteration& iteration : result.iterations) {
    v1::IterationTimes& times = *wire.add_iterations();
    times.set_permute_seconds(iteration.permute_seconds);
    times.set_select_seconds(iteration.select_seconds);
    times.set_attend_seconds(iteration.attend_seconds);
  }
  wire.set_backend(backend.name);
  wire.set_isa(backend.isa);
}

std::optional<grpc::ByteBuffer> AttendReply::Next() {
  if (!std::exchange(header_sent_, true)) return wire::EncodeMessage(header_);
  while (part_idx_ < parts_.size() && part_offset_ == parts_[part_idx_].bytes) {
    ++part_idx_;
    part_offset_ = 0;
  }
  if (part_idx_ < parts_.size()) return NextChunk();
  if (!std::exchange(stats_sent_, true)) return wire::EncodeMessage(stats_);
  return std::nullopt;
}

grpc::ByteBuffer AttendReply::NextChunk() {
  const Part& part = parts_[part_idx_];
  const int64_t bytes = std::min<int64_t>(chunk_bytes_, part.bytes - part_offset_);
  wire::TensorChunk chunk;
  chunk.tensor = part.tensor;
  chunk.offset = static_cast<uint64_t>(part_offset_);
  chunk.data = wire::Payload(
      wire::SliceOf(part.data + part_offset_, static_cast<size_t>(bytes), held_));
  part_offset_ += bytes;
  return wire::EncodeResponseChunk(chunk);
}

}  // namespace pbs::server
