#include "server/codec/attend_request.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/status.h"
#include "server/codec/attention_options.h"
#include "server/codec/chunk_assembler.h"
#include "server/codec/kv_format.h"
#include "server/codec/request_limits.h"

namespace pbs::server {
namespace {

using TensorTable = std::array<const v1::TensorSpec*, v1::TensorName_ARRAYSIZE>;

std::string ShapeText(const google::protobuf::RepeatedField<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}
std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

bool IsInput(v1::TensorName tensor) {
  return tensor == v1::Q || tensor == v1::K || tensor == v1::V || tensor == v1::ORDER ||
         tensor == v1::LIST_OFFSETS || tensor == v1::LIST_INDICES;
}

absl::StatusOr<TensorTable> IndexTensors(const v1::AttendHeader& header) {
  TensorTable table{};
  for (const v1::TensorSpec& spec : header.tensors()) {
    if (!IsInput(spec.tensor())) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", TensorLabel(spec.tensor()),
          " cannot be uploaded; only Q, K, V, ORDER, LIST_OFFSETS, LIST_INDICES can"));
    }
    if (table[spec.tensor()] != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", TensorLabel(spec.tensor()), " is announced more than once"));
    }
    table[spec.tensor()] = &spec;
  }
  return table;
}

absl::Status CheckElement(const v1::TensorSpec& spec, v1::DType expected) {
  if (spec.dtype() == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "dtype of tensor ", TensorLabel(spec.tensor()), " ",
      v1::DType_IsValid(spec.dtype()) ? v1::DType_Name(spec.dtype())
                                      : absl::StrCat(static_cast<int>(spec.dtype())),
      " is not ", v1::DType_Name(expected)));
}

absl::Status CheckRank(const v1::TensorSpec& spec, size_t rank,
                       absl::string_view where = "") {
  if (static_cast<size_t>(spec.shape_size()) == rank) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("rank of tensor ", TensorLabel(spec.tensor()), " ",
                   spec.shape_size(), " is not ", rank, where));
}

absl::Status CheckShape(const v1::TensorSpec& spec,
                        const std::vector<int64_t>& expected) {
  PBS_ABSL_RETURN_IF_ERROR(CheckRank(spec, expected.size()));
  if (std::equal(expected.begin(), expected.end(), spec.shape().begin(),
                 spec.shape().end())) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("shape of tensor ", TensorLabel(spec.tensor()), " ",
                   ShapeText(spec.shape()), " is not ", ShapeText(expected)));
}

// One axis of a shape: what it is called and how long it may be.
struct Axis {
  const char* name;
  int64_t low;
  int64_t high;
};

constexpr Axis kBatchAxis = {"batch", 1, kNumSequencesMax};
constexpr Axis kHeadsAxis = {"heads", 1, kNumHeadsMax};
constexpr Axis kLengthAxis = {"length", 0, kSeqLenMax};
constexpr Axis kTotalAxis = {"total length", 0, kTotalTokensMax};
constexpr Axis kWidthAxis = {"head_dim", 1, kHeadDims.back()};

// Every later product of these axes stays below 2^50.
absl::Status CheckAxes(const v1::TensorSpec& spec, std::initializer_list<Axis> axes,
                       absl::string_view where = "") {
  PBS_ABSL_RETURN_IF_ERROR(CheckRank(spec, axes.size(), where));
  int i = 0;
  for (const Axis& axis : axes) {
    PBS_ABSL_RETURN_IF_ERROR(
        CheckRange(absl::StrCat(axis.name, " of tensor ", TensorLabel(spec.tensor())),
                   spec.shape(i++), axis.low, axis.high));
  }
  return absl::OkStatus();
}

absl::StatusOr<DType> CheckQkvTypes(const TensorTable& table) {
  for (v1::TensorName tensor : {v1::Q, v1::K, v1::V}) {
    if (table[tensor] == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", TensorLabel(tensor), " is missing in the header"));
    }
  }
  PBS_ABSL_ASSIGN_OR_RETURN(const DType dtype,
                            DecodeDType("dtype of tensor Q", table[v1::Q]->dtype()));
  PBS_ABSL_RETURN_IF_ERROR(CheckElement(*table[v1::K], table[v1::Q]->dtype()));
  PBS_ABSL_RETURN_IF_ERROR(CheckElement(*table[v1::V], table[v1::Q]->dtype()));
  return dtype;
}

// The lengths of a packed batch: [batch + 1], first 0, not falling, last `total`.
absl::Status CheckLengths(const char* field,
                          const google::protobuf::RepeatedField<int32_t>& lengths,
                          int64_t total) {
  PBS_ABSL_RETURN_IF_ERROR(CheckRange(absl::StrCat("number of ", field), lengths.size(),
                                      2, kNumSequencesMax + 1));
  if (lengths[0] != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, "[0] ", lengths[0], " is not 0"));
  }
  for (int i = 1; i < lengths.size(); ++i) {
    if (lengths[i] < lengths[i - 1]) {
      return absl::InvalidArgumentError(absl::StrCat(field, "[", i, "] ", lengths[i],
                                                     " falls below ", field, "[", i - 1,
                                                     "] ", lengths[i - 1]));
    }
  }
  const int32_t last = lengths[lengths.size() - 1];
  if (last != total) {
    return absl::InvalidArgumentError(absl::StrCat(
        "last of ", field, " ", last, " is not the tensor's length ", total));
  }
  return absl::OkStatus();
}

absl::Status DecodePacked(const v1::AttendHeader& header, const TensorTable& table,
                          AttendSpec& spec) {
  const v1::TensorSpec &q = *table[v1::Q], &k = *table[v1::K], &v = *table[v1::V];
  for (const v1::TensorSpec* tensor : {&q, &k}) {
    PBS_ABSL_RETURN_IF_ERROR(
        CheckAxes(*tensor, {kHeadsAxis, kTotalAxis, kWidthAxis}, " with cu_seqlens"));
  }
  const int64_t num_heads = q.shape(0), total_q = q.shape(1), head_dim = q.shape(2);
  const int64_t num_kv_heads = k.shape(0), total_k = k.shape(1);
  PBS_ABSL_RETURN_IF_ERROR(CheckShape(k, {num_kv_heads, total_k, head_dim}));
  PBS_ABSL_RETURN_IF_ERROR(CheckShape(v, {num_kv_heads, total_k, head_dim}));

  const bool own_k_lengths = header.cu_seqlens_k_size() > 0;
  const auto& q_ends = header.cu_seqlens();
  const auto& k_ends = own_k_lengths ? header.cu_seqlens_k() : header.cu_seqlens();
  PBS_ABSL_RETURN_IF_ERROR(CheckLengths("cu_seqlens", q_ends, total_q));
  PBS_ABSL_RETURN_IF_ERROR(
      CheckLengths(own_k_lengths ? "cu_seqlens_k" : "cu_seqlens", k_ends, total_k));
  if (q_ends.size() != k_ends.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("number of cu_seqlens_k ", k_ends.size(),
                     " is not the number of cu_seqlens ", q_ends.size()));
  }
  spec.packed = true;
  spec.problem.shape = {static_cast<int32_t>(num_heads),
                        static_cast<int32_t>(num_kv_heads),
                        static_cast<int32_t>(head_dim),
                        {}};
  for (int i = 1; i < q_ends.size(); ++i) {
    spec.problem.shape.sequences.push_back(
        {q_ends[i] - q_ends[i - 1], k_ends[i] - k_ends[i - 1]});
  }
  return absl::OkStatus();
}

absl::Status DecodeDenseBatch(const TensorTable& table, AttendSpec& spec) {
  const v1::TensorSpec &q = *table[v1::Q], &k = *table[v1::K], &v = *table[v1::V];
  for (const v1::TensorSpec* tensor : {&q, &k}) {
    PBS_ABSL_RETURN_IF_ERROR(
        CheckAxes(*tensor, {kBatchAxis, kHeadsAxis, kLengthAxis, kWidthAxis},
                  " without cu_seqlens"));
  }
  const int64_t batch = q.shape(0), num_heads = q.shape(1), head_dim = q.shape(3);
  const int64_t num_kv_heads = k.shape(1), k_len = k.shape(2);
  PBS_ABSL_RETURN_IF_ERROR(CheckShape(k, {batch, num_kv_heads, k_len, head_dim}));
  PBS_ABSL_RETURN_IF_ERROR(CheckShape(v, {batch, num_kv_heads, k_len, head_dim}));
  const SequenceShape lengths = {static_cast<int32_t>(q.shape(2)),
                                 static_cast<int32_t>(k_len)};
  spec.problem.shape = {
      static_cast<int32_t>(num_heads), static_cast<int32_t>(num_kv_heads),
      static_cast<int32_t>(head_dim),
      std::vector<SequenceShape>(static_cast<size_t>(batch), lengths)};
  return absl::OkStatus();
}

absl::Status DecodeUploadedShape(const v1::AttendHeader& header,
                                 const TensorTable& table, AttendSpec& spec) {
  PBS_ABSL_ASSIGN_OR_RETURN(spec.problem.dtype, CheckQkvTypes(table));
  if (header.cu_seqlens_size() > 0) return DecodePacked(header, table, spec);
  if (header.cu_seqlens_k_size() > 0) {
    return absl::InvalidArgumentError("cu_seqlens_k needs cu_seqlens");
  }
  return DecodeDenseBatch(table, spec);
}

absl::Status DecodeSynthetic(const v1::AttendHeader& header, const TensorTable& table,
                             AttendSpec& spec) {
  for (v1::TensorName tensor : {v1::Q, v1::K, v1::V}) {
    if (table[tensor] == nullptr) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", TensorLabel(tensor), " and synthetic exclude each other"));
  }
  if (header.cu_seqlens_size() > 0 || header.cu_seqlens_k_size() > 0) {
    return absl::InvalidArgumentError("cu_seqlens and synthetic exclude each other");
  }
  const v1::SyntheticSpec& wire = header.synthetic();
  PBS_ABSL_RETURN_IF_ERROR(
      CheckRange("synthetic.batch", wire.batch(), 1, kNumSequencesMax));
  PBS_ABSL_RETURN_IF_ERROR(
      CheckRange("synthetic.seq_len", wire.seq_len(), 1, kSeqLenMax));
  PBS_ABSL_ASSIGN_OR_RETURN(spec.problem.dtype,
                            DecodeDType("synthetic.dtype", wire.dtype()));
  spec.problem.shape = {wire.num_heads(), wire.num_kv_heads(), wire.head_dim(),
                        std::vector<SequenceShape>(static_cast<size_t>(wire.batch()),
                                                   {wire.seq_len(), wire.seq_len()})};
  spec.generator = GeneratorSpec{wire.seed(), wire.white_noise()};
  return absl::OkStatus();
}

absl::Status CheckTokens(const AttentionProblem& problem, int32_t tokens_max) {
  for (size_t i = 0; i < problem.shape.sequences.size(); ++i) {
    const int32_t k_len = problem.shape.sequences[i].k_len;
    if (k_len > tokens_max) {
      return absl::InvalidArgumentError(
          absl::StrCat("k_len of sequence ", i, " ", k_len,
                       " exceeds attend_tokens_max ", tokens_max));
    }
  }
  return absl::OkStatus();
}

// A given tensor and the option that uses it come together.
absl::Status CheckGiven(const TensorTable& table, v1::TensorName tensor,
                        const char* option, bool used) {
  if ((table[tensor] != nullptr) == used) return absl::OkStatus();
  return absl::InvalidArgumentError(
      used ? absl::StrCat(option, " needs tensor ", TensorLabel(tensor))
           : absl::StrCat("tensor ", TensorLabel(tensor), " needs ", option));
}

absl::Status CheckOrderAndLists(const TensorTable& table, const AttentionGeometry& g,
                                const AttendSpec& spec) {
  const AttentionOptions& options = spec.problem.options;
  PBS_ABSL_RETURN_IF_ERROR(
      CheckGiven(table, v1::ORDER, "use_given_order", options.use_given_order));
  for (v1::TensorName tensor : {v1::LIST_OFFSETS, v1::LIST_INDICES}) {
    PBS_ABSL_RETURN_IF_ERROR(
        CheckGiven(table, tensor, "use_given_lists", options.use_given_lists));
  }
  if (options.use_given_order) {
    PBS_ABSL_RETURN_IF_ERROR(CheckElement(*table[v1::ORDER], v1::I32));
    const auto batch = static_cast<int64_t>(g.sequences.size());
    const int64_t heads = g.num_order_heads;
    PBS_ABSL_RETURN_IF_ERROR(CheckShape(
        *table[v1::ORDER],
        spec.packed ? std::vector<int64_t>{heads, g.total_k}
                    : std::vector<int64_t>{batch, heads, g.sequences[0].k_len}));
  }
  if (options.use_given_lists) {
    PBS_ABSL_RETURN_IF_ERROR(CheckElement(*table[v1::LIST_OFFSETS], v1::I64));
    PBS_ABSL_RETURN_IF_ERROR(CheckElement(*table[v1::LIST_INDICES], v1::U16));
    PBS_ABSL_RETURN_IF_ERROR(
        CheckShape(*table[v1::LIST_OFFSETS], {g.total_query_blocks * g.num_heads + 1}));
    PBS_ABSL_RETURN_IF_ERROR(
        CheckAxes(*table[v1::LIST_INDICES], {{"length", 0, g.total_entries}}));
  }
  return absl::OkStatus();
}

void SetLayouts(const AttentionGeometry& g, AttendSpec& spec) {
  const int64_t heads = g.num_heads, kv_heads = g.num_kv_heads, dim = g.head_dim;
  if (spec.packed) {
    spec.q_layout = spec.o_layout = PackedLayout(g.total_q, dim);
    spec.kv_layout = PackedLayout(g.total_k, dim);
    spec.lse_layout = PackedLayout(g.total_q, 1);
    spec.order_layout = PackedLayout(g.total_k, 1);
    return;
  }
  const int64_t q_len = g.sequences[0].q_len, k_len = g.sequences[0].k_len;
  spec.q_layout = spec.o_layout = DenseBatchLayout(heads, q_len, dim);
  spec.kv_layout = DenseBatchLayout(kv_heads, k_len, dim);
  spec.lse_layout = DenseBatchLayout(heads, q_len, 1);
  spec.order_layout = DenseBatchLayout(g.num_order_heads, k_len, 1);
}

void SetUploads(const TensorTable& table, const AttentionGeometry& g,
                AttendSpec& spec) {
  const int64_t row_bytes = g.head_dim * DTypeBytes(spec.problem.dtype);
  const int64_t rows = g.total_query_blocks * g.num_heads;
  const auto add = [&](v1::TensorName tensor, int64_t bytes) {
    if (table[tensor] != nullptr) spec.uploads.push_back({tensor, bytes});
  };
  add(v1::Q, g.num_heads * g.total_q * row_bytes);
  add(v1::K, g.num_kv_heads * g.total_k * row_bytes);
  add(v1::V, g.num_kv_heads * g.total_k * row_bytes);
  add(v1::ORDER, g.num_order_heads * g.total_k * static_cast<int64_t>(sizeof(int32_t)));
  add(v1::LIST_OFFSETS, (rows + 1) * static_cast<int64_t>(sizeof(int64_t)));
  if (table[v1::LIST_INDICES] != nullptr) {
    add(v1::LIST_INDICES,
        table[v1::LIST_INDICES]->shape(0) * static_cast<int64_t>(sizeof(uint16_t)));
  }
}

absl::Status DecodeWant(const v1::AttendHeader& header, AttendSpec& spec) {
  spec.want_o = header.want_size() == 0;
  for (int i = 0; i < header.want_size(); ++i) {
    switch (header.want(i)) {
      case v1::O:
        spec.want_o = true;
        break;
      case v1::LSE:
        spec.wanted.lse = true;
        break;
      case v1::ORDER:
        spec.wanted.order = true;
        break;
      case v1::LIST_OFFSETS:
      case v1::LIST_INDICES:
        spec.wanted.lists = true;
        break;
      default:
        return absl::InvalidArgumentError(absl::StrCat(
            "want[", i, "] ", TensorLabel(header.want(i)),
            " is not a result; results are O, LSE, ORDER, LIST_OFFSETS, LIST_INDICES"));
    }
  }
  return absl::OkStatus();
}

absl::Status DecodeScalars(const v1::AttendHeader& header, AttendSpec& spec) {
  PBS_ABSL_RETURN_IF_ERROR(CheckText("request_id", header.request_id().size()));
  PBS_ABSL_RETURN_IF_ERROR(CheckRange("warmup", header.warmup(), 0, kWarmupMax));
  PBS_ABSL_RETURN_IF_ERROR(
      CheckRange("repetitions", header.repetitions(), 0, kRepetitionsMax));
  spec.request_id = header.request_id();
  spec.warmup = header.warmup();
  spec.repetitions = std::max(header.repetitions(), 1);
  spec.allow_non_finite = header.allow_non_finite();
  if (spec.allow_non_finite && spec.problem.options.method != Method::kDense) {
    return absl::InvalidArgumentError(
        absl::StrCat("allow_non_finite needs method dense, not ",
                     MethodName(spec.problem.options.method)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AttendSpec> DecodeAttendHeader(const v1::AttendHeader& header,
                                              const AttendLimits& limits) {
  AttendSpec spec;
  PBS_ABSL_ASSIGN_OR_RETURN(spec.problem.options,
                            DecodeAttentionOptions(header.options(), AttentionProfile(),
                                                   /*dense_fallback=*/false));
  PBS_ABSL_RETURN_IF_ERROR(DecodeScalars(header, spec));
  PBS_ABSL_RETURN_IF_ERROR(DecodeWant(header, spec));
  PBS_ABSL_ASSIGN_OR_RETURN(const TensorTable table, IndexTensors(header));
  PBS_ABSL_RETURN_IF_ERROR(header.has_synthetic()
                               ? DecodeSynthetic(header, table, spec)
                               : DecodeUploadedShape(header, table, spec));
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(ValidateProblem(spec.problem)));
  PBS_ABSL_RETURN_IF_ERROR(CheckTokens(spec.problem, limits.tokens_max));
  const AttentionGeometry geometry = MakeGeometry(spec.problem);
  PBS_ABSL_RETURN_IF_ERROR(CheckOrderAndLists(table, geometry, spec));
  SetLayouts(geometry, spec);
  SetUploads(table, geometry, spec);
  return spec;
}

absl::StatusOr<BlockLists> DecodeBlockLists(std::span<const int64_t> offsets,
                                            std::span<const uint16_t> indices) {
  if (offsets.front() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("LIST_OFFSETS[0] ", offsets.front(), " is not 0"));
  }
  const size_t num_rows = offsets.size() - 1;
  BlockLists lists;
  lists.count.resize(num_rows);
  for (size_t row = 0; row < num_rows; ++row) {
    // By comparison, so that no difference overflows.
    if (offsets[row + 1] < offsets[row]) {
      return absl::InvalidArgumentError(
          absl::StrCat("LIST_OFFSETS[", row + 1, "] ", offsets[row + 1],
                       " falls below LIST_OFFSETS[", row, "] ", offsets[row]));
    }
    if (offsets[row + 1] - offsets[row] > kKeyBlocksMax) {
      return absl::InvalidArgumentError(
          absl::StrCat("block list ", row, " has ", offsets[row + 1] - offsets[row],
                       " entries, more than ", kKeyBlocksMax));
    }
    lists.count[row] = static_cast<uint16_t>(offsets[row + 1] - offsets[row]);
  }
  if (offsets.back() != static_cast<int64_t>(indices.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("last of LIST_OFFSETS ", offsets.back(),
                     " is not the length of LIST_INDICES ", indices.size()));
  }
  lists.begin.assign(offsets.begin(), offsets.end() - 1);
  lists.indices.assign(indices.begin(), indices.end());
  lists.num_masked.resize(num_rows);
  return lists;
}

}  // namespace pbs::server
