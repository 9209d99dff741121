#include "server/service/health.h"

#include <atomic>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "proto/wire/messages.h"
#include "server/base/status.h"
#include "server/codec/request_limits.h"
#include "server/codec/wire_status.h"
#include "server/service/write_loop.h"

namespace pbs::server {

namespace health = grpc::health::v1;

namespace {

absl::StatusOr<std::string> DecodeService(const grpc::ByteBuffer& buffer) {
  health::HealthCheckRequest request;
  PBS_ABSL_RETURN_IF_ERROR(FromWire(wire::DecodeMessage(buffer, &request)));
  PBS_ABSL_RETURN_IF_ERROR(CheckText("service", request.service().size()));
  return std::move(*request.mutable_service());
}

grpc::Status ToStatus(const absl::Status& status) {
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

}  // namespace

// One watcher: sends a status whenever it differs from the last one sent.
class HealthWatch final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                          private WriteLoop::Stream {
 public:
  HealthWatch(HealthService& service, TaskPool& movers, const grpc::ByteBuffer& request)
      : service_(service), loop_(*this, movers) {
    absl::StatusOr<std::string> name = DecodeService(request);
    if (!name.ok()) {
      refused_ = std::move(name).status();
    } else {
      name_ = *std::move(name);
      if (!service.Add(this)) end_ = absl::StatusCode::kUnavailable;
    }
    loop_.Wake();
  }

  void Wake() { loop_.Wake(); }
  void Stop(absl::StatusCode code) {
    end_ = code;
    loop_.Wake();
  }

  void OnWriteDone(bool ok) override { loop_.OnWriteDone(ok); }
  void OnCancel() override { Stop(absl::StatusCode::kCancelled); }
  void OnDone() override { delete this; }

 private:
  NextWrite Next() override {
    if (!refused_.ok()) return NextWrite::End(refused_);
    const absl::StatusCode end = end_;
    if (end != absl::StatusCode::kOk) {
      return NextWrite::End(absl::Status(end, "the watch is over"));
    }
    const auto status = service_.Get(name_);
    if (status == sent_) return NextWrite::Wait();
    sent_ = status;
    health::HealthCheckResponse response;
    response.set_status(status);
    return NextWrite::Message(wire::EncodeMessage(response));
  }
  void OnBroken() override { end_ = absl::StatusCode::kCancelled; }
  void Send(const grpc::ByteBuffer* message) override { StartWrite(message); }
  void End(const absl::Status& status) override {
    service_.Remove(this);
    Finish(ToStatus(status));
  }

  HealthService& service_;
  WriteLoop loop_;
  std::string name_;
  absl::Status refused_;
  std::atomic<absl::StatusCode> end_{absl::StatusCode::kOk};
  std::optional<HealthService::Status::ServingStatus> sent_;
};

void HealthService::Set(const std::string& service, bool serving) {
  MutexLock lock(mutex_);
  serving_[service] = serving;
  for (HealthWatch* watch : watches_) watch->Wake();
}

void HealthService::EndWatches() {
  MutexLock lock(mutex_);
  ended_ = true;
  for (HealthWatch* watch : watches_) watch->Stop(absl::StatusCode::kUnavailable);
}

HealthService::Status::ServingStatus HealthService::Get(
    const std::string& service) const {
  MutexLock lock(mutex_);
  const auto found = serving_.find(service);
  if (found == serving_.end()) return Status::SERVICE_UNKNOWN;
  return found->second ? Status::SERVING : Status::NOT_SERVING;
}

grpc::ServerUnaryReactor* HealthService::Check(grpc::CallbackServerContext* context,
                                               const grpc::ByteBuffer* request,
                                               grpc::ByteBuffer* response) {
  ++begun_;
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const absl::StatusOr<std::string> name = DecodeService(*request);
  if (!name.ok()) {
    reactor->Finish(ToStatus(name.status()));
    return reactor;
  }
  health::HealthCheckResponse answer;
  answer.set_status(Get(*name));
  if (answer.status() == Status::SERVICE_UNKNOWN) {
    reactor->Finish({grpc::StatusCode::NOT_FOUND, "no such service"});
    return reactor;
  }
  *response = wire::EncodeMessage(answer);
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* HealthService::Watch(
    grpc::CallbackServerContext*, const grpc::ByteBuffer* request) {
  ++begun_;
  return new HealthWatch(*this, movers_, *request);
}

bool HealthService::Add(HealthWatch* watch) {
  MutexLock lock(mutex_);
  if (!ended_) watches_.insert(watch);
  return !ended_;
}

void HealthService::Remove(HealthWatch* watch) {
  MutexLock lock(mutex_);
  watches_.erase(watch);
}

}  // namespace pbs::server
