// Reads the tensors of a checkpoint once each, in rising order, hashes what it reads
// and refuses numbers that are not finite.
//
// Threading: one thread. Memory: O(1) beyond what callers ask for.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "server/model/checkpoint.h"
#include "server/model/digest.h"
#include "server/model/fp8.h"
#include "server/model/load_control.h"

namespace pbs {

// What all readers of one load share.
struct ReadSession {
  const Checkpoint& checkpoint;
  const LoadControl& control;
  const Fp8Format& fp8;
  ModelDigest digest;
  int64_t bytes_done = 0;
  int64_t bytes_total = 0;
  int64_t bytes_reported = 0;
};

// One tensor from its first byte to its last; the digest learns it at the end.
class TensorReader {
 public:
  TensorReader(ReadSession& session, const TensorInfo& tensor)
      : session_(&session), tensor_(&tensor) {}

  const TensorInfo& tensor() const { return *tensor_; }
  // The next `bytes` bytes, whole elements, as stored. Cancelled when the load was
  // stopped; InvalidArgument at the last byte of a tensor with NaN or infinite
  // elements, with their number.
  Status Read(int64_t bytes, void* target);

 private:
  ReadSession* session_;
  const TensorInfo* tensor_;
  TensorHash hash_;
  int64_t done_ = 0;
  int64_t num_not_finite_ = 0;
};

// One weight [rows, cols], row by row: as stored, or, of FP8, as bf16 (fp8.h).
class WeightReader {
 public:
  WeightReader(ReadSession& session, const TensorInfo& weight);

  const TensorInfo& tensor() const { return reader_.tensor(); }
  DType dtype() const { return is_fp8_ ? DType::kBF16 : *tensor().dtype; }
  // The next `count` rows in dtype().
  Status Read(int64_t count, void* rows);

 private:
  Status ReadScales();

  ReadSession* session_;
  TensorReader reader_;
  bool is_fp8_;
  std::vector<float> scales_;  // read with the first rows
  ScaleGrid grid_;
  int64_t row_ = 0;
  std::vector<uint8_t> stored_;
};

// Several weights [rows_i, cols] under one another, as one weight in `dtype`.
class StackedRows {
 public:
  StackedRows(ReadSession& session, std::span<const TensorInfo* const> parts);

  // Of the parts when they agree, else f32.
  DType dtype() const { return dtype_; }
  int64_t num_rows() const;
  // The next `count` rows, converted to dtype().
  Status Read(int64_t count, void* rows);

 private:
  std::vector<WeightReader> parts_;
  DType dtype_;
  size_t part_ = 0;       // being read
  int64_t part_row_ = 0;  // its next row
  std::vector<uint8_t> stored_;
};

// The scales of an FP8 weight; null when there are none.
const TensorInfo* FindFp8Scale(const Checkpoint& checkpoint, const TensorInfo& weight);

// A whole small tensor as f32.
StatusOr<std::vector<float>> ReadAsFloats(ReadSession& session,
                                          const TensorInfo& tensor);

}  // namespace pbs
