// Reads the tensors of a checkpoint once each, in rising order, and hashes what it
// reads.
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
#include "server/model/weights.h"

namespace pbs {

// What all readers of one load share.
struct ReadSession {
  const Checkpoint& checkpoint;
  const LoadControl& control;
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
  // The next `bytes` bytes, as stored. Cancelled when the load was stopped.
  Status Read(int64_t bytes, void* target);

 private:
  ReadSession* session_;
  const TensorInfo* tensor_;
  TensorHash hash_;
  int64_t done_ = 0;
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
  std::vector<TensorReader> parts_;
  DType dtype_;
  size_t part_ = 0;       // being read
  int64_t part_row_ = 0;  // its next row
  std::vector<uint8_t> stored_;
};

// A whole small tensor as f32.
StatusOr<std::vector<float>> ReadAsFloats(ReadSession& session,
                                          const TensorInfo& tensor);

}  // namespace pbs
