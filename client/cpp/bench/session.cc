#include "client/cpp/bench/session.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cpp/bench/download.h"
#include "client/cpp/bench/page_buffer.h"
#include "client/cpp/bench/shared_memory_download.h"
#include "client/cpp/bench/tcp_transfer.h"
#include "client/cpp/bench/upload.h"

namespace pbs::bench {
namespace {

using Say = std::function<void(const std::string&)>;

class Session {
 public:
  Session(const BenchOptions& options, const Peers& peers, const Say& say)
      : options_(options), peers_(peers), say_(say) {}
  ~Session() {
    if (source_.kv.has_lease()) {
      (void)clients_.front()->Release(source_.kv.lease().ticket());
    }
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  absl::StatusOr<SessionResult> Run() {
    for (const auto step : {&Session::Connect, &Session::PrepareUploads,
                            &Session::PrepareDownloads, &Session::MeasureRounds}) {
      if (absl::Status status = (this->*step)(); !status.ok()) return status;
    }
    return std::move(result_);
  }

 private:
  absl::Status Connect();
  absl::Status ConnectTcp(int64_t bytes);
  absl::Status PrepareUploads();
  absl::Status PrepareDownloads();
  absl::Status AddShared(int32_t streams, bool checksums);
  absl::StatusOr<v1::ModelInfo> FindModel();
  absl::Status LeaseCache();
  absl::Status AddPeerDownloads(int32_t streams);
  absl::Status KeepLease();
  absl::Status CheckTcp();
  absl::Status MeasureRounds();
  absl::Status MeasureOnce(size_t index);
  void Add(std::unique_ptr<Transfer> transfer);

  const BenchOptions& options_;
  const Peers& peers_;
  const Say& say_;
  SessionResult result_;
  Clients clients_;
  TcpConnections connections_;
  PageBuffer upload_memory_;
  PageBuffer download_memory_;
  DownloadSource source_;
  std::vector<std::unique_ptr<Transfer>> transfers_;  // one per result_.cells
};

absl::Status Session::Connect() {
  const int32_t streams =
      *std::max_element(options_.streams.begin(), options_.streams.end());
  for (int32_t i = 0; i < streams; ++i) {
    client::ClientOptions terms;
    terms.address = options_.server;
    terms.follow_endpoints = false;  // what was named is measured
    terms.stream_window_bytes = options_.stream_window_bytes;
    auto connected = client::Client::Connect(terms);
    if (!connected.ok()) return connected.status();
    clients_.push_back(*std::move(connected));
  }
  auto info = clients_.front()->GetServerInfo();
  if (!info.ok()) return info.status();
  result_.server = *std::move(info);
  return absl::OkStatus();
}

// Connections for transfers of up to `bytes` by each stream.
absl::Status Session::ConnectTcp(int64_t bytes) {
  if (peers_.tcp == nullptr) return absl::OkStatus();
  for (size_t i = 0; i < clients_.size(); ++i) {
    auto connected = peers_.tcp->Connect(bytes);
    if (!connected.ok()) return connected.status();
    connections_.push_back(*std::move(connected));
  }
  return absl::OkStatus();
}

void Session::Add(std::unique_ptr<Transfer> transfer) {
  result_.cells.push_back({transfer->label(), transfer->bytes(), {}});
  transfers_.push_back(std::move(transfer));
}

absl::Status Session::PrepareUploads() {
  if (!options_.uploads()) return absl::OkStatus();
  say_("preparing the upload");
  auto memory = PageBuffer::Allocate(int64_t{options_.mib} << 20);
  if (!memory.ok()) return memory.status();
  upload_memory_ = *std::move(memory);
  FillUpload(upload_memory_.span());
  for (int32_t streams : options_.streams) {
    std::vector<std::span<const std::byte>> parts;
    for (int32_t i = 0; i < streams; ++i) {
      parts.push_back(UploadPart(upload_memory_.span(), streams, i));
      say_(absl::StrCat("verifying upload stream ", i + 1, " of ", streams));
      absl::Status right =
          VerifyUpload(*clients_[i], parts.back(), options_.chunk_bytes);
      if (!right.ok()) return right;
    }
    Add(MakeUpload(clients_, upload_memory_.span(), streams, options_.chunk_bytes));
    if (peers_.tcp != nullptr) {
      Add(MakeTcpUpload(connections_, std::move(parts), options_.chunk_bytes));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::ModelInfo> Session::FindModel() {
  const auto models = clients_.front()->ListModels();
  if (!models.ok()) return models.status();
  for (const v1::ModelInfo& model : models->models()) {
    const bool only = options_.model.empty() && models->models_size() == 1;
    if (only || model.name() == options_.model) return model;
  }
  return absl::NotFoundError(
      absl::StrCat("--model \"", options_.model, "\" is none of the server's ",
                   models->models_size(), " models; downloads need one"));
}

// Prefills a prompt whose cache has about --mib, and leases the cache.
absl::Status Session::LeaseCache() {
  const absl::StatusOr<v1::ModelInfo> model = FindModel();
  if (!model.ok()) return model.status();
  const int64_t wanted =
      (int64_t{options_.mib} << 20) / std::max<int64_t>(1, model->kv_bytes_per_token());
  const int64_t tokens = std::clamp<int64_t>(wanted, 1, model->tokens_max());
  v1::PrefillRequest request;
  request.set_model(model->name());
  request.mutable_delivery()->mutable_lease()->set_ttl_seconds(
      result_.server.limits().lease_ttl_seconds_max());
  for (int64_t i = 0; i < tokens; ++i) {
    request.add_token_ids(static_cast<uint32_t>(i % model->vocab_size()));
  }
  say_(absl::StrCat("prefilling ", tokens, " tokens"));
  client::PrefillObserver observer;
  const auto done = clients_.front()->Prefill(request, observer);
  if (!done.ok()) return done.status();
  auto kv = clients_.front()->Describe(done->ticket());
  if (!kv.ok()) return kv.status();
  source_.kv = *std::move(kv);
  result_.kv = source_.kv;
  return absl::OkStatus();
}

absl::Status Session::PrepareDownloads() {
  if (!options_.downloads()) return ConnectTcp(int64_t{options_.mib} << 20);
  if (absl::Status leased = LeaseCache(); !leased.ok()) return leased;
  auto memory = PageBuffer::Allocate(source_.kv.bytes());
  if (!memory.ok()) return memory.status();
  download_memory_ = *std::move(memory);
  source_.memory = download_memory_.span();
  const int64_t longest =
      std::max<int64_t>(int64_t{options_.mib} << 20, source_.kv.bytes());
  if (absl::Status tcp = ConnectTcp(longest); !tcp.ok()) return tcp;
  absl::Status fetched =
      FetchReference(*clients_.front(), options_.chunk_bytes, source_);
  if (!fetched.ok()) return fetched;

  for (int32_t streams : options_.streams) {
    for (bool checksums : {true, false}) {
      if (options_.checksums == (checksums ? "off" : "on")) continue;
      auto made =
          MakeDownload(clients_, source_, streams, checksums, options_.chunk_bytes);
      if (!made.ok()) return made.status();
      Add(*std::move(made));
      if (absl::Status shared = AddShared(streams, checksums); !shared.ok()) {
        return shared;
      }
    }
    if (absl::Status added = AddPeerDownloads(streams); !added.ok()) return added;
  }
  return absl::OkStatus();
}

// The same bytes from every peer, in the same parts.
absl::Status Session::AddPeerDownloads(int32_t streams) {
  const auto layer_bytes =
      static_cast<size_t>(source_.kv.bytes() / source_.kv.num_layers());
  std::vector<std::span<std::byte>> parts;
  for (int32_t i = 0; i < streams; ++i) {
    const auto [begin, count] = LayersOf(source_.kv, streams, i);
    parts.push_back(source_.memory.subspan(layer_bytes * static_cast<size_t>(begin),
                                           layer_bytes * static_cast<size_t>(count)));
  }
  if (peers_.tcp != nullptr) {
    Add(MakeTcpDownload(connections_, parts, options_.chunk_bytes));
  }
  if (peers_.protobuf != nullptr) {
    Add(peers_.protobuf->MakeDownload(parts, options_.chunk_bytes));
  }
  if (peers_.flight != nullptr) {
    auto made =
        peers_.flight->MakeDownload(source_.kv.bytes(), streams, options_.chunk_bytes);
    if (!made.ok()) return made.status();
    Add(*std::move(made));
  }
  return absl::OkStatus();
}

absl::Status Session::AddShared(int32_t streams, bool checksums) {
  if (options_.shared_memory_socket.empty()) return absl::OkStatus();
  for (const Mapping mapping : {Mapping::kNew, Mapping::kKept}) {
    auto made =
        MakeSharedMemoryDownload(options_, source_, streams, checksums, mapping);
    if (!made.ok()) return made.status();
    Add(*std::move(made));
  }
  if (!checksums) return absl::OkStatus();  // nothing would read the bytes
  auto view = MakeSharedMemoryView(options_, source_, streams);
  if (!view.ok()) return view.status();
  Add(*std::move(view));
  return absl::OkStatus();
}

absl::Status Session::KeepLease() {
  if (!source_.kv.has_lease()) return absl::OkStatus();
  return clients_.front()
      ->Renew(source_.kv.lease().ticket(),
              result_.server.limits().lease_ttl_seconds_max())
      .status();
}

absl::Status Session::MeasureOnce(size_t index) {
  Transfer& transfer = *transfers_[index];
  const pid_t peer = peers_.pid(transfer.label().peer)
                         .value_or(static_cast<pid_t>(options_.server_pid));
  const absl::StatusOr<Sample> sample = Measure(transfer, peer);
  if (!sample.ok()) return sample.status();
  result_.cells[index].samples.push_back(*sample);
  return absl::OkStatus();
}

absl::Status Session::CheckTcp() {
  if (peers_.tcp == nullptr) return absl::OkStatus();
  const auto memory = options_.uploads() ? upload_memory_.span() : source_.memory;
  const auto bytes = memory.first(std::min<size_t>(memory.size(), 16 << 20));
  return VerifyTcp(connections_.front(), bytes, options_.chunk_bytes);
}

absl::Status Session::MeasureRounds() {
  if (absl::Status tcp = CheckTcp(); !tcp.ok()) return tcp;
  for (int32_t round = -1; round < options_.rounds; ++round) {  // the first warms up
    say_(absl::StrCat("round ", round + 1, " of ", options_.rounds));
    if (absl::Status kept = KeepLease(); !kept.ok()) return kept;
    for (size_t i = 0; i < transfers_.size(); ++i) {
      // There and back, so that nobody always runs after the same neighbour.
      const size_t index = round % 2 == 0 ? i : transfers_.size() - 1 - i;
      if (absl::Status status = MeasureOnce(index); !status.ok()) return status;
    }
    if (round >= 0) continue;
    for (Cell& cell : result_.cells) cell.samples.clear();
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SessionResult> RunSession(const BenchOptions& options,
                                         const Peers& peers, const Say& say) {
  return Session(options, peers, say).Run();
}

}  // namespace pbs::bench
