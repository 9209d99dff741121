// Reads each tensor of a checkpoint once, in rising order, hashes the bytes and refuses
// numbers that are not finite.
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

// State that all readers of one load share.
struct ReadSession {
  const Checkpoint& checkpoint;
  const LoadControl& control;
  const Fp8Format& fp8;
  ModelDigest digest;
  int64_t bytes_done = 0;
  int64_t bytes_total = 0;
  int64_t bytes_reported = 0;
};

// Reads one tensor from its first byte to its last. After the last byte it adds the
// tensor to the digest.
class TensorReader {
 public:
  TensorReader(ReadSession& session, const TensorInfo& tensor)
      : session_(&session), tensor_(&tensor) {}

  const TensorInfo& tensor() const { return *tensor_; }
  // Reads the next `bytes` bytes, whole elements, as stored. Cancelled when the load
  // was stopped. A tensor with NaN or infinite elements gives InvalidArgument, with
  // their number, at its last byte.
  Status Read(int64_t bytes, void* target);

 private:
  ReadSession* session_;
  const TensorInfo* tensor_;
  TensorHash hash_;
  int64_t done_ = 0;
  int64_t num_not_finite_ = 0;
};

// Reads one weight [rows, cols] row by row, as stored; an FP8 weight as bf16 (fp8.h).
class WeightReader {
 public:
  WeightReader(ReadSession& session, const TensorInfo& weight);

  const TensorInfo& tensor() const { return reader_.tensor(); }
  DType dtype() const { return is_fp8_ ? DType::kBF16 : *tensor().dtype; }
  // Reads the next `count` rows in dtype().
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

// Reads several weights [rows_i, cols], one below the other, as one weight in dtype().
class StackedRows {
 public:
  StackedRows(ReadSession& session, std::span<const TensorInfo* const> parts);

  // The dtype of the parts when all have the same, else f32.
  DType dtype() const { return dtype_; }
  int64_t num_rows() const;
  // Reads the next `count` rows, converted to dtype().
  Status Read(int64_t count, void* rows);

 private:
  std::vector<WeightReader> parts_;
  DType dtype_;
  size_t part_ = 0;       // the part that is being read
  int64_t part_row_ = 0;  // its next row
  std::vector<uint8_t> stored_;
};

// The scales of an FP8 weight; null when there are none.
const TensorInfo* FindFp8Scale(const Checkpoint& checkpoint, const TensorInfo& weight);

// Reads a whole small tensor as f32.
StatusOr<std::vector<float>> ReadAsFloats(ReadSession& session,
                                          const TensorInfo& tensor);

}  // namespace pbs
