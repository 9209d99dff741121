#include "client/cpp/raw_stream.h"
#include <memory>
#include <string>

#include "proto/wire/messages.h"

namespace pbs::client {
namespace {

void* const kTag = nullptr;  // one operation at a time needs no names

}  // namespace

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      status.error_message());
}

RawStream::RawStream(const std::shared_ptr<grpc::Channel>& channel,
                     const std::string& method, const CallTerms& terms) {
  if (terms.deadline != absl::InfiniteFuture()) {
    context_.set_deadline(absl::ToChronoTime(terms.deadline));
  }
  context_.set_wait_for_ready(terms.wait_for_ready);
  grpc::GenericStub stub(channel);
  call_ = stub.PrepareCall(&context_, method, &queue_);
  call_->StartCall(kTag);
  Await();
}

RawStream::~RawStream() {
  if (!finished_) {
    Cancel();
    (void)Finish();
  }
  queue_.Shutdown();
  void* tag;
  bool ok;
  while (queue_.Next(&tag, &ok)) {
  }
}

bool RawStream::Await() {
  void* tag;
  bool ok = false;
  return queue_.Next(&tag, &ok) && ok;
}

bool RawStream::Write(const grpc::ByteBuffer& message) {
  call_->Write(message, kTag);
  return Await();
}

bool RawStream::WritesDone() {
  call_->WritesDone(kTag);
  return Await();
}

bool RawStream::Read(grpc::ByteBuffer* message) {
  call_->Read(message, kTag);
  return Await();
}

absl::Status RawStream::Finish() {
  finished_ = true;
  grpc::Status status;
  call_->Finish(&status, kTag);
  Await();
  return FromGrpc(status);
}

absl::Status CallUnary(const std::shared_ptr<grpc::Channel>& channel,
                       const std::string& method, const CallTerms& terms,
                       const google::protobuf::MessageLite& request,
                       google::protobuf::MessageLite* reply) {
  RawStream stream(channel, method, terms);
  grpc::ByteBuffer message;
  if (stream.Write(wire::EncodeMessage(request))) stream.WritesDone();
  const bool answered = stream.Read(&message);
  if (absl::Status status = stream.Finish(); !status.ok()) return status;
  if (!answered) return absl::InternalError(method + " gave no reply");
  return FromGrpc(wire::DecodeMessage(message, reply));
}

}  // namespace pbs::client
