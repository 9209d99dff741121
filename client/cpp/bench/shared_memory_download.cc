#include "client/cpp/bench/shared_memory_download.h"

#include <cstdint>
#include <memory>
#include <utility>

#include "client/cpp/client.h"

namespace pbs::bench {
namespace {

absl::StatusOr<Clients> ConnectClients(const BenchOptions& options, int32_t count) {
  Clients clients;
  for (int32_t i = 0; i < count; ++i) {
    client::ClientOptions terms;
    terms.address = options.server;
    terms.follow_endpoints = false;  // what was named is measured
    terms.stream_window_bytes = options.stream_window_bytes;
    terms.shared_memory_socket = options.shared_memory_socket;
    auto connected = client::Client::Connect(terms);
    if (!connected.ok()) return connected.status();
    clients.push_back(*std::move(connected));
  }
  return clients;
}

// What a download does, with clients that map the cache.
class SharedMemoryDownload final : public Transfer {
 public:
  SharedMemoryDownload(const BenchOptions& options, const DownloadSource& source,
                       int32_t streams, bool checksums, Mapping mapping)
      : Transfer({"download", mapping == Mapping::kNew ? "shm copy" : "shm copy kept",
                  streams, checksums}),
        options_(options),
        source_(source),
        mapping_(mapping) {}

  absl::Status Connect() {
    auto clients = ConnectClients(options_, label().streams);
    if (!clients.ok()) return clients.status();
    clients_ = *std::move(clients);
    auto download = MakeDownload(clients_, source_, label().streams, label().checksums,
                                 options_.chunk_bytes);
    if (!download.ok()) return download.status();
    download_ = *std::move(download);
    return absl::OkStatus();
  }

  int64_t bytes() const override { return source_.kv.bytes(); }

  void Prepare() override {
    if (mapping_ == Mapping::kNew) connected_ = Connect();
    download_->Prepare();
  }
  absl::Status Run(int32_t stream) override {
    return connected_.ok() ? download_->Run(stream) : connected_;
  }
  absl::Status Check() override { return download_->Check(); }

 private:
  const BenchOptions& options_;
  const DownloadSource& source_;
  const Mapping mapping_;
  absl::Status connected_;
  Clients clients_;
  std::unique_ptr<Transfer> download_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Transfer>> MakeSharedMemoryDownload(
    const BenchOptions& options, const DownloadSource& source, int32_t streams,
    bool checksums, Mapping mapping) {
  auto made = std::make_unique<SharedMemoryDownload>(options, source, streams,
                                                     checksums, mapping);
  if (absl::Status connected = made->Connect(); !connected.ok()) return connected;
  return made;
}

}  // namespace pbs::bench
