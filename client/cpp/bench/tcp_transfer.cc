#include "client/cpp/bench/tcp_transfer.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace pbs::bench {
namespace {

// `Byte` is const for uploads.
template <class Byte>
class TcpTransfer final : public Transfer {
  static constexpr bool kUpload = std::is_const_v<Byte>;

 public:
  TcpTransfer(TcpConnections& connections, std::vector<std::span<Byte>> parts,
              int32_t chunk_bytes)
      : Transfer({.direction = kUpload ? "upload" : "download",
                  .peer = "tcp",
                  .streams = static_cast<int32_t>(parts.size())}),
        connections_(connections),
        parts_(std::move(parts)),
        chunk_bytes_(static_cast<size_t>(chunk_bytes)) {}

  int64_t bytes() const override {
    size_t sum = 0;
    for (const auto& part : parts_) sum += part.size();
    return static_cast<int64_t>(sum);
  }

  // As before a fetch, so that the caches are in the same state.
  void Prepare() override {
    if constexpr (!kUpload) {
      for (const auto& part : parts_) std::memset(part.data(), 0xA5, part.size());
    }
  }

  absl::Status Run(int32_t stream) override {
    TcpConnection& connection = connections_[stream];
    if constexpr (kUpload) {
      return connection.Upload(parts_[stream], chunk_bytes_);
    } else {
      return connection.Download(parts_[stream], chunk_bytes_);
    }
  }

 private:
  TcpConnections& connections_;
  const std::vector<std::span<Byte>> parts_;
  const size_t chunk_bytes_;
};

}  // namespace

std::unique_ptr<Transfer> MakeTcpUpload(TcpConnections& connections,
                                        std::vector<std::span<const std::byte>> parts,
                                        int32_t chunk_bytes) {
  return std::make_unique<TcpTransfer<const std::byte>>(connections, std::move(parts),
                                                        chunk_bytes);
}

std::unique_ptr<Transfer> MakeTcpDownload(TcpConnections& connections,
                                          std::vector<std::span<std::byte>> parts,
                                          int32_t chunk_bytes) {
  return std::make_unique<TcpTransfer<std::byte>>(connections, std::move(parts),
                                                  chunk_bytes);
}

absl::Status VerifyTcp(TcpConnection& connection, std::span<const std::byte> bytes,
                       int32_t chunk_bytes) {
  const auto chunk = static_cast<size_t>(chunk_bytes);
  std::vector<std::byte> back(bytes.size());
  if (absl::Status sent = connection.Upload(bytes, chunk); !sent.ok()) return sent;
  if (absl::Status got = connection.Download(back, chunk); !got.ok()) return got;
  return std::ranges::equal(back, bytes)
             ? absl::OkStatus()
             : absl::DataLossError("the raw TCP peer returned other bytes");
}

}  // namespace pbs::bench
