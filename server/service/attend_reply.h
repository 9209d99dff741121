// One Attend's way out: header, chunks of the wanted results, stats, one message at a
// time.
//
// Threading: one thread at a time. Memory: chunks point into the result, which lives
// until gRPC has sent the last of them; only an order of several sequences is laid out
// anew.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <grpcpp/support/byte_buffer.h>

#include "pbs/v1/attention.pb.h"
#include "server/engine/engine.h"
#include "server/service/attend_request.h"
#include "server/service/options.h"

namespace pbs::server {

class AttendReply {
 public:
  AttendReply(const AttendSpec& spec, const BackendFacts& backend, int32_t chunk_bytes,
              AttendResult result);

  // The next message; nullopt after the stats.
  std::optional<grpc::ByteBuffer> Next();

 private:
  // What the chunks point into. Shared with the slices that gRPC still holds.
  struct Held {
    AttendResult result;
    std::vector<int64_t> list_offsets;
  };
  struct Part {
    v1::TensorName tensor;
    const std::byte* data;
    int64_t bytes;
  };

  void AddPart(v1::TensorName tensor, v1::DType dtype, std::vector<int64_t> shape,
               const void* data);
  void AddOrder(const AttendSpec& spec, const AttentionGeometry& geometry);
  void AddLists(const AttentionGeometry& geometry);
  void FillStats(const BackendFacts& backend);
  grpc::ByteBuffer NextChunk();

  const int32_t chunk_bytes_;
  std::shared_ptr<Held> held_;
  v1::AttendResponse header_;
  v1::AttendResponse stats_;
  std::vector<Part> parts_;
  bool header_sent_ = false;
  bool stats_sent_ = false;
  size_t part_idx_ = 0;
  int64_t part_offset_ = 0;  // bytes of the part that were sent
};

}  // namespace pbs::server
