#include "client/cpp/bench/shared_memory_download.h"

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "client/cpp/client.h"
#include "proto/wire/crc32c.h"

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

// Keeps the views of a stream.
class Views final : public client::KvTarget {
 public:
  std::span<std::byte> Array(int32_t, v1::KvChunk::Kind, int64_t) override {
    return {};  // only shared memory is wanted
  }
  bool TakesViews() const override { return true; }
  void OnView(const client::KvView& view) override { views_.push_back(view); }

  void Clear() { views_.clear(); }
  uint32_t Extend(uint32_t crc) const {
    for (const client::KvView& view : views_) {
      crc = wire::ExtendCrc32c(crc, view.bytes);
    }
    return crc;
  }

 private:
  std::vector<client::KvView> views_;
};

// Checks the cache where it lies; clients have mapped it before.
class SharedMemoryView final : public Transfer {
 public:
  SharedMemoryView(const BenchOptions& options, const DownloadSource& source,
                   Clients clients)
      : Transfer({"download", "shm view", static_cast<int32_t>(clients.size()), true}),
        options_(options),
        source_(source),
        clients_(std::move(clients)),
        views_(clients_.size()) {}

  int64_t bytes() const override { return source_.kv.bytes(); }
  void Prepare() override {
    for (Views& views : views_) views.Clear();
  }
  absl::Status Run(int32_t stream) override {
    return clients_[stream]->Fetch(
        PartOf(source_, label().streams, stream, true, options_.chunk_bytes),
        views_[stream]);
  }
  absl::Status Check() override {
    uint32_t crc = 0;
    for (const Views& views : views_) crc = views.Extend(crc);
    if (crc == source_.crc32c) return absl::OkStatus();
    return absl::DataLossError("the views of shared memory have other bytes");
  }

 private:
  const BenchOptions& options_;
  const DownloadSource& source_;
  const Clients clients_;
  std::vector<Views> views_;  // by stream; layers in order
};

}  // namespace

absl::StatusOr<std::unique_ptr<Transfer>> MakeSharedMemoryView(
    const BenchOptions& options, const DownloadSource& source, int32_t streams) {
  auto clients = ConnectClients(options, streams);
  if (!clients.ok()) return clients.status();
  return std::make_unique<SharedMemoryView>(options, source, *std::move(clients));
}

absl::StatusOr<std::unique_ptr<Transfer>> MakeSharedMemoryDownload(
    const BenchOptions& options, const DownloadSource& source, int32_t streams,
    bool checksums, Mapping mapping) {
  auto made = std::make_unique<SharedMemoryDownload>(options, source, streams,
                                                     checksums, mapping);
  if (absl::Status connected = made->Connect(); !connected.ok()) return connected;
  return made;
}

}  // namespace pbs::bench
