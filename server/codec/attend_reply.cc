#include "server/codec/attend_reply.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "proto/wire/messages.h"
#include "server/codec/attention_options.h"
#include "server/codec/kv_format.h"
#include "server/codec/stage_seconds.h"

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

}  // namespace

AttendReply::AttendReply(const AttendSpec& spec, const BackendFacts& backend,
                         int32_t chunk_bytes, AttendResult result, const Clock& clock)
    : clock_(clock),
      chunk_bytes_(std::min(chunk_bytes, kChunkPayloadBytesMax)),
      held_(std::make_shared<Held>()) {
  held_->result = std::move(result);
  const AttentionGeometry g = MakeGeometry(spec.problem);
  const auto batch = static_cast<int64_t>(g.sequences.size());
  const int64_t heads = g.num_heads, dim = g.head_dim;
  std::vector<int64_t> rows =
      spec.packed ? std::vector<int64_t>{heads, g.total_q}
                  : std::vector<int64_t>{batch, heads, g.sequences[0].q_len};
  if (spec.wanted.lse) AddTensor(v1::LSE, v1::F32, rows, held_->result.lse.data());
  if (spec.wanted.order) AddOrder(spec, g);
  if (spec.wanted.lists) AddLists(g);
  if (spec.want_o) {
    rows.push_back(dim);
    AddTensor(v1::O, EncodeDType(spec.problem.dtype), rows, held_->result.o.data());
  }
  header_.mutable_header();
  FillStats(backend);
}

void AttendReply::AddTensor(v1::TensorName tensor, v1::DType dtype,
                            const std::vector<int64_t>& shape, const void* data) {
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

// [batch, heads, keys] on the wire, [heads, keys of all sequences] in the report.
void AttendReply::AddOrder(const AttendSpec& spec, const AttentionGeometry& g) {
  const std::vector<int32_t>& order = held_->result.report.order;
  const int64_t heads = g.num_order_heads;
  if (spec.packed) {
    AddTensor(v1::ORDER, v1::I32, {heads, g.total_k}, order.data());
    return;
  }
  const auto batch = static_cast<int64_t>(g.sequences.size());
  AddTensor(v1::ORDER, v1::I32, {batch, heads, g.sequences[0].k_len}, order.data());
  parts_.back().outer = batch;
  parts_.back().inner = heads;
}

// The report has where each row begins; the wire wants the end of the last one too.
void AttendReply::AddLists(const AttentionGeometry& g) {
  const BlockLists& lists = held_->result.report.lists;
  const int64_t num_rows = g.total_query_blocks * g.num_heads;
  held_->list_end = static_cast<int64_t>(lists.indices.size());
  AddTensor(v1::LIST_OFFSETS, v1::I64, {num_rows + 1}, lists.begin.data());
  Part& begins = parts_.back();
  begins.bytes -= sizeof(int64_t);
  parts_.push_back({v1::LIST_OFFSETS,
                    reinterpret_cast<const std::byte*>(&held_->list_end),
                    sizeof(int64_t), begins.bytes});
  AddTensor(v1::LIST_INDICES, v1::U16, {held_->list_end}, lists.indices.data());
}

void AttendReply::FillStats(const BackendFacts& backend) {
  const AttendResult& result = held_->result;
  const AttentionStats& stats = result.report.stats;
  v1::AttendStats& wire = *stats_.mutable_stats();
  wire.set_method_run(EncodeMethod(stats.method_run));
  wire.set_dense_fallback(stats.dense_fallback);
  wire.set_density(stats.Density());
  wire.set_lower_density(stats.LowerDensity());
  for (double density : result.report.heads.density) wire.add_head_density(density);
  wire.set_executed_blocks(stats.executed_blocks);
  wire.set_causal_blocks(stats.causal_blocks);
  wire.set_dense_blocks(stats.dense_blocks);
  wire.set_executed_flops(stats.executed_flops);
  wire.set_dense_flops(stats.dense_flops);
  wire.set_coverage(stats.coverage);
  wire.set_coverage_rows(stats.coverage_rows);
  const AttentionHeads& heads = result.report.heads;
  wire.mutable_head_coverage()->Add(heads.coverage.begin(), heads.coverage.end());
  wire.mutable_guarded_heads()->Add(heads.guarded.begin(), heads.guarded.end());
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
  if (!std::exchange(header_sent_, true)) {
    send_start_ = clock_.Now();
    return wire::EncodeMessage(header_);
  }
  while (part_idx_ < parts_.size() && part_offset_ == parts_[part_idx_].bytes) {
    ++part_idx_;
    part_offset_ = 0;
  }
  if (part_idx_ < parts_.size()) return NextChunk();
  if (!std::exchange(stats_sent_, true)) return EncodeStats();
  return std::nullopt;
}

std::span<const std::byte> AttendReply::Part::At(int64_t offset) const {
  const int64_t row_bytes = bytes / (outer * inner);
  const int64_t row = offset / row_bytes;
  const int64_t held_row = row % inner * outer + row / inner;
  const int64_t skipped = offset % row_bytes;
  return {data + held_row * row_bytes + skipped,
          static_cast<size_t>(row_bytes - skipped)};
}

grpc::ByteBuffer AttendReply::NextChunk() {
  const Part& part = parts_[part_idx_];
  const int64_t end = std::min(part.bytes, part_offset_ + chunk_bytes_);
  wire::TensorChunk chunk;
  chunk.tensor = part.tensor;
  chunk.offset = static_cast<uint64_t>(part.tensor_offset + part_offset_);
  for (int32_t i = 0; i < kSlicesMax && part_offset_ < end; ++i) {
    const std::span<const std::byte> row = part.At(part_offset_);
    const auto bytes = std::min(row.size(), static_cast<size_t>(end - part_offset_));
    chunk.data.Append(wire::SliceOf(row.data(), bytes, held_));
    part_offset_ += static_cast<int64_t>(bytes);
  }
  return wire::EncodeResponseChunk(chunk);
}

grpc::ByteBuffer AttendReply::EncodeStats() {
  send_seconds_ = absl::ToDoubleSeconds(clock_.Now() - send_start_);
  stats_.mutable_stats()->mutable_stages()->set_send(send_seconds_);
  return wire::EncodeMessage(stats_);
}

}  // namespace pbs::server
