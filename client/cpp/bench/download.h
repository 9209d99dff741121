// Downloads: KvSource.Fetch of a leased cache. Each stream fetches a part of the
// layers.
//
// Threading: as Transfer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "client/cpp/bench/transfer.h"
#include "client/cpp/bench/upload.h"
#include "pbs/v1/kv.pb.h"

namespace pbs::bench {

struct DownloadSource {
  v1::KvDescriptor kv;          // the leased cache
  std::span<std::byte> memory;  // kv.bytes() bytes; every download writes here
  uint32_t crc32c = 0;          // of the whole cache, from a fetch with all checks
};

struct LayerRange {
  int32_t begin = 0, count = 0;
};
// The layers that stream `stream` of `streams` fetches.
LayerRange LayersOf(const v1::KvDescriptor& kv, int32_t streams, int32_t stream);

// What stream `stream` of `streams` asks for.
v1::FetchRequest PartOf(const DownloadSource& source, int32_t streams, int32_t stream,
                        bool checksums, int32_t chunk_bytes);

// Fetches `source.kv` once with checksums and sets `source.crc32c`. FailedPrecondition
// when the cache is not complete.
absl::Status FetchReference(client::Client& client, int32_t chunk_bytes,
                            DownloadSource& source);

// Stream i of the transfer calls clients[i]. `source` and clients must outlive it.
// InvalidArgument when there are fewer layers than streams.
absl::StatusOr<std::unique_ptr<Transfer>> MakeDownload(const Clients& clients,
                                                       const DownloadSource& source,
                                                       int32_t streams, bool checksums,
                                                       int32_t chunk_bytes);

}  // namespace pbs::bench
