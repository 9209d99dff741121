#include "client/cpp/bench/download.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>

#include "absl/strings/str_cat.h"
#include "proto/wire/crc32c.h"

namespace pbs::bench {
namespace {

// Arrays at their place in one block: by layer, keys before values.
class BlockTarget final : public client::KvTarget {
 public:
  explicit BlockTarget(std::span<std::byte> memory) : memory_(memory) {}

  std::span<std::byte> Array(int32_t layer, v1::KvChunk::Kind kind,
                             int64_t bytes) override {
    const auto size = static_cast<size_t>(bytes);
    const auto index =
        static_cast<size_t>(layer) * 2 + (kind == v1::KvChunk::V ? 1 : 0);
    if (size * (index + 1) > memory_.size()) return {};
    return memory_.subspan(size * index, size);
  }

 private:
  const std::span<std::byte> memory_;
};

class Download final : public Transfer {
 public:
  Download(const Clients& clients, const DownloadSource& source, int32_t streams,
           bool checksums, int32_t chunk_bytes)
      : Transfer({"download", "pbs", streams, checksums}),
        clients_(clients),
        source_(source),
        chunk_bytes_(chunk_bytes) {}

  int64_t bytes() const override { return source_.kv.bytes(); }

  void Prepare() override {
    std::memset(source_.memory.data(), 0xA5, source_.memory.size());
  }

  absl::Status Run(int32_t stream) override {
    BlockTarget target(source_.memory);
    return clients_[stream]->Fetch(
        PartOf(source_, label().streams, stream, label().checksums, chunk_bytes_),
        target);
  }

  absl::Status Check() override {
    if (wire::Crc32c(source_.memory) == source_.crc32c) return absl::OkStatus();
    return absl::DataLossError("a fetch returned other bytes than the fetch before it");
  }

 private:
  const Clients& clients_;
  const DownloadSource& source_;
  const int32_t chunk_bytes_;
};

}  // namespace

LayerRange LayersOf(const v1::KvDescriptor& kv, int32_t streams, int32_t stream) {
  const int32_t begin = kv.num_layers() * stream / streams;
  return {.begin = begin, .count = kv.num_layers() * (stream + 1) / streams - begin};
}

v1::FetchRequest PartOf(const DownloadSource& source, int32_t streams, int32_t stream,
                        bool checksums, int32_t chunk_bytes) {
  const LayerRange layers = LayersOf(source.kv, streams, stream);
  v1::FetchRequest request;
  *request.mutable_ticket() = source.kv.lease().ticket();
  request.set_layer_begin(layers.begin);
  request.set_layer_count(layers.count);
  request.set_chunk_bytes(chunk_bytes);
  request.set_checksums(checksums);
  return request;
}

absl::Status FetchReference(client::Client& client, int32_t chunk_bytes,
                            DownloadSource& source) {
  if (source.kv.state() != v1::COMPLETE) {
    return absl::FailedPreconditionError("the leased cache is not complete");
  }
  v1::FetchRequest request;
  *request.mutable_ticket() = source.kv.lease().ticket();
  request.set_chunk_bytes(chunk_bytes);
  BlockTarget target(source.memory);
  absl::Status status = client.Fetch(request, target);
  if (status.ok()) source.crc32c = wire::Crc32c(source.memory);
  return status;
}

absl::StatusOr<std::unique_ptr<Transfer>> MakeDownload(const Clients& clients,
                                                       const DownloadSource& source,
                                                       int32_t streams, bool checksums,
                                                       int32_t chunk_bytes) {
  if (streams > source.kv.num_layers()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--streams ", streams, " exceeds the ", source.kv.num_layers(),
                     " layers of model ", source.kv.model()));
  }
  return std::make_unique<Download>(clients, source, streams, checksums, chunk_bytes);
}

}  // namespace pbs::bench
