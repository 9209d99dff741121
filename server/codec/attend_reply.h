// The reply of an Attend, one message at a time: header, chunks of the wanted results,
// stats.
//
// Threading: one thread at a time. Memory: chunks point into the result, which lives
// until gRPC has sent the last of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include <grpcpp/support/byte_buffer.h>

#include "absl/time/time.h"
#include "pbs/v1/attention.pb.h"
#include "server/base/clock.h"
#include "server/codec/attend_request.h"
#include "server/codec/backend_facts.h"
#include "server/engine/engine.h"

namespace pbs::server {

class AttendReply {
 public:
  // The most slices of one chunk: each takes about 100 bytes that are not charged.
  static constexpr int32_t kSlicesMax = 256;

  // `clock` must outlive the reply.
  AttendReply(const AttendSpec& spec, const BackendFacts& backend, int32_t chunk_bytes,
              AttendResult result, const Clock& clock);

  // The next message; nullopt after the stats.
  std::optional<grpc::ByteBuffer> Next();

  // Seconds from the Next() of the header to the Next() of the stats, which state them
  // too.
  double send_seconds() const { return send_seconds_; }

 private:
  // The memory that the chunks point into. Slices that gRPC still holds share it.
  struct Held {
    AttendResult result;
    int64_t list_end = 0;  // the last value of LIST_OFFSETS
  };
  // A part of a tensor: a matrix of rows, [outer, inner] on the wire and [inner, outer]
  // in the result.
  struct Part {
    v1::TensorName tensor;
    const std::byte* data;
    int64_t bytes;
    int64_t tensor_offset = 0;
    int64_t outer = 1;
    int64_t inner = 1;

    // The bytes from byte `offset` of the part to the end of its row.
    std::span<const std::byte> At(int64_t offset) const;
  };

  // Announces a tensor and adds it as one part.
  void AddTensor(v1::TensorName tensor, v1::DType dtype,
                 const std::vector<int64_t>& shape, const void* data);
  void AddOrder(const AttendSpec& spec, const AttentionGeometry& geometry);
  void AddLists(const AttentionGeometry& geometry);
  void FillStats(const BackendFacts& backend);
  grpc::ByteBuffer NextChunk();
  grpc::ByteBuffer EncodeStats();

  const Clock& clock_;
  const int32_t chunk_bytes_;
  std::shared_ptr<Held> held_;
  v1::AttendResponse header_;
  v1::AttendResponse stats_;
  std::vector<Part> parts_;
  bool header_sent_ = false;
  bool stats_sent_ = false;
  size_t part_idx_ = 0;
  int64_t part_offset_ = 0;  // bytes of the part that are sent
  absl::Time send_start_;
  double send_seconds_ = 0;
};

}  // namespace pbs::server
