#include "client/cpp/bench/protobuf_peer.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "client/cpp/bench/page_buffer.h"
#include "client/cpp/bench/upload.h"
#include "client/cpp/raw_stream.h"
#include "pbs/v1/kv.grpc.pb.h"
#include "proto/wire/crc32c.h"

namespace pbs::bench {
namespace {

// ---- the peer's side

// Answers a fetch of `token_count` bytes with the first bytes of its memory.
class Source final : public v1::KvSource::Service {
  grpc::Status Fetch(grpc::ServerContext*, const v1::FetchRequest* request,
                     grpc::ServerWriter<v1::KvChunk>* writer) override {
    const auto size = static_cast<size_t>(request->token_count());
    const auto chunk_bytes = static_cast<size_t>(request->chunk_bytes());
    const std::shared_ptr<const PageBuffer> memory = Memory(size);
    if (memory == nullptr || chunk_bytes == 0) {
      return {grpc::StatusCode::RESOURCE_EXHAUSTED, "no memory"};
    }
    const std::byte* data = memory->span().data();
    for (size_t offset = 0; offset < size; offset += chunk_bytes) {
      v1::KvChunk chunk;
      chunk.set_kind(v1::KvChunk::K);
      chunk.set_byte_offset(offset);
      chunk.set_payload(data + offset, std::min(chunk_bytes, size - offset));
      if (!writer->Write(chunk)) break;
    }
    return grpc::Status::OK;
  }

  // At least `size` bytes, the same at every call. Streams keep what they read from
  // when a longer one comes.
  std::shared_ptr<const PageBuffer> Memory(size_t size) {
    absl::MutexLock lock(&mutex_);
    if (memory_ == nullptr || memory_->span().size() < size) {
      auto grown = PageBuffer::Allocate(static_cast<int64_t>(size));
      if (!grown.ok()) return nullptr;
      FillUpload(grown->span());
      memory_ = std::make_shared<const PageBuffer>(*std::move(grown));
    }
    return memory_;
  }

  absl::Mutex mutex_;
  std::shared_ptr<const PageBuffer> memory_;
};

[[noreturn]] void RunPeer(int output) {
  Source source;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&source);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || write(output, &port, sizeof(port)) != sizeof(port)) _exit(1);
  server->Wait();
  _exit(0);
}

// ---- ours

class Download final : public Transfer {
 public:
  Download(const std::string& address, std::vector<std::span<std::byte>> parts,
           int32_t chunk_bytes)
      : Transfer({.direction = "download",
                  .peer = "protobuf",
                  .streams = static_cast<int32_t>(parts.size())}),
        parts_(std::move(parts)),
        chunk_bytes_(chunk_bytes) {
    for (const std::span<std::byte> part : parts_) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection each
      stubs_.push_back(v1::KvSource::NewStub(grpc::CreateCustomChannel(
          address, grpc::InsecureChannelCredentials(), arguments)));
      FillUpload(part);
      right_.push_back(wire::Crc32c(part));
    }
  }

  int64_t bytes() const override {
    size_t sum = 0;
    for (const auto& part : parts_) sum += part.size();
    return static_cast<int64_t>(sum);
  }

  void Prepare() override {
    for (const auto& part : parts_) std::memset(part.data(), 0xA5, part.size());
  }

  absl::Status Run(int32_t stream) override {
    const std::span<std::byte> part = parts_[stream];
    v1::FetchRequest request;
    request.set_token_count(static_cast<int32_t>(part.size()));
    request.set_chunk_bytes(chunk_bytes_);
    grpc::ClientContext context;
    const auto reader = stubs_[stream]->Fetch(&context, request);
    v1::KvChunk chunk;
    while (reader->Read(&chunk)) {
      const std::string& payload = chunk.payload();
      if (chunk.byte_offset() > part.size() ||
          payload.size() > part.size() - chunk.byte_offset()) {
        return absl::DataLossError("the protobuf peer sent more than was asked for");
      }
      std::memcpy(part.data() + chunk.byte_offset(), payload.data(), payload.size());
    }
    return client::FromGrpc(reader->Finish());
  }

  absl::Status Check() override {
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (wire::Crc32c(parts_[i]) != right_[i]) {
        return absl::DataLossError("the protobuf peer sent other bytes");
      }
    }
    return absl::OkStatus();
  }

 private:
  const std::vector<std::span<std::byte>> parts_;
  const int32_t chunk_bytes_;
  std::vector<std::unique_ptr<v1::KvSource::Stub>> stubs_;
  std::vector<uint32_t> right_;  // CRC-32C of each part
};

}  // namespace

absl::StatusOr<std::unique_ptr<ProtobufPeer>> ProtobufPeer::Start() {
  std::array<int, 2> ends{};
  if (pipe2(ends.data(), O_CLOEXEC) != 0) {
    return absl::UnavailableError("protobuf peer: no pipe");
  }
  auto process = ChildProcess::Fork([&] { RunPeer(ends[1]); });
  close(ends[1]);
  int port = 0;
  const bool answered =
      process.ok() && read(ends[0], &port, sizeof(port)) == sizeof(port);
  close(ends[0]);
  if (!process.ok()) return process.status();
  if (!answered) return absl::UnavailableError("the protobuf peer did not start");
  return std::unique_ptr<ProtobufPeer>(
      new ProtobufPeer(*std::move(process), absl::StrCat("127.0.0.1:", port)));
}

std::unique_ptr<Transfer> ProtobufPeer::MakeDownload(
    std::vector<std::span<std::byte>> parts, int32_t chunk_bytes) const {
  return std::make_unique<Download>(address_, std::move(parts), chunk_bytes);
}

}  // namespace pbs::bench
