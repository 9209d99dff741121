#include "server/service/attend_upload.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/synthetic/synthetic.h"
#include "pbs/check.h"
#include "server/base/status.h"
#include "server/transfer/finite_scan.h"

namespace pbs::server {
namespace {

template <class T>
std::span<const T> Elements(const HostBytes& bytes) {
  return {reinterpret_cast<const T*>(bytes.data()),
          static_cast<size_t>(bytes.size()) / sizeof(T)};
}

bool IsFloatTensor(v1::TensorName tensor) {
  return tensor == v1::Q || tensor == v1::K || tensor == v1::V;
}

// Where sequence `sequence` of a [batch, heads, len, dim] tensor starts.
void* SequenceStart(HostBytes& bytes, const RowLayout& layout, int32_t sequence,
                    DType dtype) {
  return bytes.data() + layout.sequence_stride * sequence * DTypeBytes(dtype);
}

}  // namespace

absl::StatusOr<std::unique_ptr<AttendUpload>> AttendUpload::Create(
    AttendSpec spec, AttendReservation reservation,
    const std::shared_ptr<BlockCache>& blocks) {
  auto upload = std::unique_ptr<AttendUpload>(
      new AttendUpload(std::move(spec), std::move(reservation)));
  PBS_ABSL_RETURN_IF_ERROR(upload->Allocate(blocks));
  return upload;
}

absl::Status AttendUpload::Allocate(const std::shared_ptr<BlockCache>& blocks) {
  for (const UploadSpec& upload : spec_.uploads) {
    Input& input = Find(upload.tensor);
    PBS_ABSL_ASSIGN_OR_RETURN(input.bytes, HostBytes::Reuse(upload.bytes, blocks));
    assembler_.Expect(upload.tensor, input.bytes.span());
  }
  if (!spec_.generator.has_value()) return absl::OkStatus();
  const AttentionShape& shape = spec_.problem.shape;
  const int64_t head_bytes = static_cast<int64_t>(shape.sequences.size()) *
                             shape.sequences[0].k_len * shape.head_dim *
                             DTypeBytes(spec_.problem.dtype);
  PBS_ABSL_ASSIGN_OR_RETURN(Find(v1::Q).bytes,
                            HostBytes::Allocate(head_bytes * shape.num_heads));
  PBS_ABSL_ASSIGN_OR_RETURN(Find(v1::K).bytes,
                            HostBytes::Allocate(head_bytes * shape.num_kv_heads));
  PBS_ABSL_ASSIGN_OR_RETURN(Find(v1::V).bytes,
                            HostBytes::Allocate(head_bytes * shape.num_kv_heads));
  return absl::OkStatus();
}

absl::Status AttendUpload::Add(const wire::TensorChunk& chunk) {
  PBS_ABSL_RETURN_IF_ERROR(assembler_.Add(chunk));
  if (spec_.allow_non_finite || !IsFloatTensor(chunk.tensor)) return absl::OkStatus();
  return ScanNewElements(Find(chunk.tensor));
}

// Chunks may cut elements; only whole ones are looked at, each once.
absl::Status AttendUpload::ScanNewElements(Input& input) {
  const DType dtype = spec_.problem.dtype;
  const auto received = assembler_.Received(input.tensor);
  const auto from = static_cast<size_t>(input.scanned * DTypeBytes(dtype));
  const auto bad = FirstNonFinite(received.subspan(from), dtype);
  if (bad.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", TensorLabel(input.tensor),
                                                   " element ", input.scanned + *bad,
                                                   " is NaN or infinite"));
  }
  input.scanned = static_cast<int64_t>(received.size()) / DTypeBytes(dtype);
  return absl::OkStatus();
}

absl::Status AttendUpload::Generate(const std::atomic<bool>& stop) {
  const AttentionProblem& problem = spec_.problem;
  const SyntheticShape shape = {problem.shape.num_heads, problem.shape.num_kv_heads,
                                problem.shape.sequences[0].k_len,
                                problem.shape.head_dim};
  const auto batch = static_cast<int32_t>(problem.shape.sequences.size());
  for (int32_t i = 0; i < batch; ++i) {
    const SyntheticTargets targets = {
        problem.dtype,
        SequenceStart(Find(v1::Q).bytes, spec_.q_layout, i, problem.dtype),
        SequenceStart(Find(v1::K).bytes, spec_.kv_layout, i, problem.dtype),
        SequenceStart(Find(v1::V).bytes, spec_.kv_layout, i, problem.dtype)};
    const uint64_t seed = spec_.generator->seed;
    PBS_ABSL_RETURN_IF_ERROR(ToAbsl(
        spec_.generator->white_noise
            ? GenerateWhiteNoise(shape, seed, i, targets, &stop)
            : GenerateStructured(shape, SyntheticSetting{}, seed, i, targets, &stop)));
  }
  return absl::OkStatus();
}

absl::StatusOr<AttendJob> AttendUpload::MakeJob(JobTerms terms,
                                                const std::atomic<bool>& stop) {
  if (spec_.generator.has_value()) PBS_ABSL_RETURN_IF_ERROR(Generate(stop));
  AttendJob job;
  const AttentionGeometry geometry = MakeGeometry(spec_.problem);
  const AttentionOptions& options = spec_.problem.options;
  job.order = {std::move(Find(v1::ORDER).bytes), spec_.order_layout};
  const ConstRows order = {options.use_given_order ? job.order.bytes.data() : nullptr,
                           job.order.layout};
  if (options.use_given_order) {
    PBS_ABSL_RETURN_IF_ERROR(ToAbsl(ValidateOrder(geometry, order)));
  }
  if (options.use_given_lists) {
    PBS_ABSL_ASSIGN_OR_RETURN(
        job.lists, DecodeBlockLists(Elements<int64_t>(Find(v1::LIST_OFFSETS).bytes),
                                    Elements<uint16_t>(Find(v1::LIST_INDICES).bytes)));
    PBS_ABSL_RETURN_IF_ERROR(ToAbsl(ValidateLists(geometry, order, job.lists.View())));
  }
  job.terms = std::move(terms);
  job.q = {std::move(Find(v1::Q).bytes), spec_.q_layout};
  job.k = {std::move(Find(v1::K).bytes), spec_.kv_layout};
  job.v = {std::move(Find(v1::V).bytes), spec_.kv_layout};
  job.o_layout = spec_.o_layout;
  job.lse_layout = spec_.lse_layout;
  job.wanted = spec_.wanted;
  job.warmup = spec_.warmup;
  job.repetitions = spec_.repetitions;
  job.problem = spec_.problem;
  job.reservation = std::move(reservation_);
  return job;
}

AttendUpload::Input& AttendUpload::Find(v1::TensorName tensor) {
  for (Input& input : inputs_) {
    if (input.tensor == tensor) return input;
  }
  PBS_CHECK(false);
}

}  // namespace pbs::server
