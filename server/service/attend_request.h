// AttendHeader -> plain values. The boundary that checks: what comes out is valid, and
// every size in it fits int64 by far.
//
// Threading: stateless. Memory: a few words per sequence of the batch.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "pbs/v1/attention.pb.h"
#include "server/base/attention_options.h"

namespace pbs::server {

struct AttendLimits {
  int32_t tokens_max = 0;  // keys of one sequence
  AttentionProfile default_attention;
};

// A tensor that the upload must bring.
struct UploadSpec {
  v1::TensorName tensor = v1::TENSOR_NAME_UNSPECIFIED;
  int64_t bytes = 0;

  bool operator==(const UploadSpec&) const = default;
};

struct GeneratorSpec {
  uint64_t seed = 0;
  bool white_noise = false;
};

struct AttendSpec {
  std::string request_id;
  AttentionProblem problem;  // valid
  // Packed: tensors are [heads, tokens of all sequences, width]; else
  // [batch, heads, tokens, width].
  bool packed = false;
  RowLayout q_layout, kv_layout, o_layout, lse_layout, order_layout;
  std::vector<UploadSpec> uploads;
  std::optional<GeneratorSpec> generator;  // makes q, k and v instead of an upload
  bool want_o = false, want_lse = false, want_order = false, want_lists = false;
  bool allow_non_finite = false;
  int32_t warmup = 0;
  int32_t repetitions = 1;
};

// Every rule of attention.proto that can be told from the header. Errors:
// InvalidArgument names field, value and limit; Unimplemented for a reserved method.
absl::StatusOr<AttendSpec> DecodeAttendHeader(const v1::AttendHeader& header,
                                              const AttendLimits& limits);

// Uploaded block lists (CSR) as the kernels take them. InvalidArgument when offsets do
// not start at 0, fall, jump by more than kKeyBlocksMax or end elsewhere than at the
// number of indices. Whether the blocks may be read is for ValidateLists() to say.
absl::StatusOr<BlockLists> DecodeBlockLists(std::span<const int64_t> offsets,
                                            std::span<const uint16_t> indices);

}  // namespace pbs::server
