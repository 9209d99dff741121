// A gRPC server that forwards every call to another server and lets a test change the
// replies, as a broken network card, switch or proxy would.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <semaphore>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>

#include "client/cpp/raw_stream.h"

namespace pbs::testing_support {

// Calls of one request and any number of replies.
class GrpcProxy final : private grpc::CallbackGenericService {
 public:
  using OnReply = std::function<grpc::ByteBuffer(const std::string& method,
                                                 grpc::ByteBuffer reply)>;

  GrpcProxy(const std::string& target, OnReply on_reply)
      : channel_(grpc::CreateChannel(target, grpc::InsecureChannelCredentials())),
        on_reply_(std::move(on_reply)) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterCallbackGenericService(this);
    server_ = builder.BuildAndStart();
  }
  ~GrpcProxy() override {
    server_->Shutdown();
    server_->Wait();
    for (std::thread& thread : threads_) thread.join();
  }

  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }

 private:
  class Call final : public grpc::ServerGenericBidiReactor {
   public:
    Call(GrpcProxy& proxy, std::string method)
        : proxy_(proxy), method_(std::move(method)) {
      StartRead(&request_);
    }

    void OnReadDone(bool ok) override {
      if (!ok) return Finish(grpc::Status(grpc::StatusCode::INTERNAL, "no request"));
      const std::lock_guard<std::mutex> lock(proxy_.mutex_);
      proxy_.threads_.emplace_back([this] { Forward(); });
    }
    void OnWriteDone(bool ok) override {
      write_ok_ = ok;
      written_.release();
    }
    void OnDone() override { delete this; }

   private:
    void Forward() {
      client::RawStream stream(proxy_.channel_, method_, {});
      if (stream.Write(request_)) stream.WritesDone();
      grpc::ByteBuffer reply;
      while (write_ok_ && stream.Read(&reply)) {
        reply_ = proxy_.on_reply_(method_, std::move(reply));
        StartWrite(&reply_);
        written_.acquire();
      }
      if (!write_ok_) stream.Cancel();
      const absl::Status status = stream.Finish();
      Finish(grpc::Status(static_cast<grpc::StatusCode>(status.code()),
                          std::string(status.message())));
    }

    GrpcProxy& proxy_;
    const std::string method_;
    grpc::ByteBuffer request_, reply_;
    std::binary_semaphore written_{0};
    bool write_ok_ = true;  // passed between threads by the semaphore
  };

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    return new Call(*this, context->method());  // deletes itself
  }

  const std::shared_ptr<grpc::Channel> channel_;
  const OnReply on_reply_;
  int port_ = 0;
  std::mutex mutex_;
  std::vector<std::thread> threads_;  // under mutex_
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace pbs::testing_support
