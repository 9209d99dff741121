#include "cuda/plan/mapped_operand.h"

#include <algorithm>

namespace pbs::cuda {

std::array<uint64_t, 3> MapStrides(const MappedOperand& mapped) {
  const RowStrides& strides = mapped.operand.strides;
  const int64_t given[3] = {strides.row, strides.head, strides.sequence};
  const int64_t sizes[4] = {mapped.width, mapped.rows, mapped.heads, mapped.sequences};
  std::array<uint64_t, 3> bytes{};
  int64_t before = 1;
  for (size_t i = 0; i < 3; ++i) {
    const int64_t stride = sizes[i + 1] > 1 ? given[i] : before * sizes[i];
    bytes[i] = static_cast<uint64_t>(stride) * 2;
    before = stride;
  }
  return bytes;
}

MappedOperands MapOperands(const CudaAttentionPlan& plan, const RunParams& run) {
  const AttentionGeometry& g = plan.geometry;
  int64_t longest_q = 0;
  int64_t longest_k = 0;
  for (const SequenceGeometry& s : g.sequences) {
    longest_q = std::max<int64_t>(longest_q, s.q_len);
    longest_k = std::max<int64_t>(longest_k, s.k_len);
  }
  const auto map = [&](const RowOperand& operand, int64_t all_rows, int64_t longest,
                       int64_t heads, int32_t box_rows) {
    const bool packed = operand.strides.packed != 0;
    return MappedOperand{
        .operand = operand,
        .width = g.head_dim,
        .rows = packed ? all_rows : longest,
        .heads = heads,
        .sequences = packed ? 1 : static_cast<int64_t>(g.sequences.size()),
        .box_rows = box_rows,
        .bf16 = plan.problem.dtype == DType::kBF16};
  };
  const int64_t copied = int64_t{plan.copied_blocks} * kBlockKeys;
  const int64_t keys = plan.permutes ? copied : g.total_k;
  const int64_t key_heads = plan.permutes ? g.num_order_heads : g.num_kv_heads;
  const RowOperand o = {static_cast<const uint16_t*>(run.attention.o),
                        run.attention.o_strides};
  constexpr int32_t kQueryBox = 64;
  return {.q = map(run.q, g.total_q, longest_q, g.num_heads, kQueryBox),
          .k = map(run.k, keys, longest_k, key_heads, kBlockKeys),
          .v = map(run.v, keys, longest_k, key_heads, kBlockKeys),
          .o = map(o, g.total_q, longest_q, g.num_heads, kQueryBox)};
}

}  // namespace pbs::cuda
