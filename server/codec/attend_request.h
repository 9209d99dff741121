// Converts an AttendHeader to checked plain values. The result is valid, and every size
// in it is far below the range of int64.
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
#include "server/codec/attention_options.h"
#include "server/engine/attend_wanted.h"

namespace pbs::server {

struct AttendLimits {
  int32_t tokens_max = 0;  // keys of one sequence
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
  // True: tensors are [heads, tokens of all sequences, width]; else they are [batch,
  // heads, tokens, width].
  bool packed = false;
  RowLayout q_layout, kv_layout, o_layout, lse_layout, order_layout;
  std::vector<UploadSpec> uploads;
  std::optional<GeneratorSpec> generator;  // generates q, k and v instead of an upload
  bool want_o = false;
  AttendWanted wanted;
  bool allow_non_finite = false;
  int32_t warmup = 0;
  int32_t repetitions = 1;
};

// Checks every rule of attention.proto that depends on the header alone. Errors:
// InvalidArgument names field, value and limit; Unimplemented for a reserved method.
absl::StatusOr<AttendSpec> DecodeAttendHeader(const v1::AttendHeader& header,
                                              const AttendLimits& limits);

// Converts uploaded block lists (CSR) to those of the kernels. InvalidArgument when the
// offsets do not start at 0, fall, rise by more than kKeyBlocksMax or do not end at the
// number of indices. ValidateLists() checks whether the blocks may be read.
absl::StatusOr<BlockLists> DecodeBlockLists(std::span<const int64_t> offsets,
                                            std::span<const uint16_t> indices);

}  // namespace pbs::server
