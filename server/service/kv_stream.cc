#include "server/service/kv_stream.h"

#include <cstdint>
#include <utility>

#include "server/base/status.h"

namespace pbs::server {
namespace {

// One chunk that gRPC sends and one that is being made.
constexpr int64_t kBuffers = 2;

}  // namespace

int64_t KvStream::BufferBytes(const KvShape& shape, const KvRange& range,
                              const KvFormat& format, KvContent content) {
  return kBuffers * KvExporter::BufferBytes(shape, range, format, content);
}

void KvStream::Open(std::shared_ptr<HeldKv> kv, std::unique_ptr<KvExporter> exporter,
                    ByteReservation buffers) {
  kv_ = std::move(kv);
  exporter_ = std::move(exporter);
  buffers_ = std::move(buffers);
}

absl::StatusOr<std::optional<wire::KvChunk>> KvStream::Next() {
  if (wait_.pending()) return std::nullopt;
  PBS_ABSL_RETURN_IF_ERROR(kv_->readable());
  if (exporter_->layer() >= kv_->layers_ready()) {
    wait_.Start(kv_, exporter_->layer());
    return std::nullopt;
  }
  wire::KvChunk chunk = exporter_->Next();
  transfer_.AddChunk(chunk.scales.size() +
                     static_cast<size_t>(exporter_->BytesOf(chunk)));
  return chunk;
}

void KvStream::Close() {
  exporter_.reset();
  kv_.reset();
  buffers_.Reset();
}

}  // namespace pbs::server
