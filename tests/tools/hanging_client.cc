// A client that stops half way and waits to be killed.
//
//   hanging_client ADDRESS upload             part of an Attend's tensors
//   hanging_client ADDRESS prefill            a prefill of 3000 tokens, nothing read
//   hanging_client ADDRESS inline             the same with its cache in the stream
//   hanging_client ADDRESS fetch HANDLE EPOCH a fetch, nothing read
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include <grpcpp/grpcpp.h>

#include "pbs/v1/attention.grpc.pb.h"
#include "pbs/v1/kv.grpc.pb.h"
#include "pbs/v1/prefill.grpc.pb.h"
#include "tests/support/attend_headers.h"

namespace {

using namespace pbs;

[[noreturn]] void Hang() {
  while (true) pause();
}

[[noreturn]] void Upload(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::ClientContext context;
  auto stream = v1::Attention::NewStub(channel)->Attend(&context);
  v1::AttendRequest message;
  *message.mutable_header() = testing_support::UploadHeader({1, 8, 2048, 64});
  stream->Write(message);
  message.mutable_chunk()->set_tensor(v1::Q);
  message.mutable_chunk()->set_data(std::string(1 << 20, '\0'));
  stream->Write(message);
  Hang();
}

[[noreturn]] void Prefill(const std::shared_ptr<grpc::Channel>& channel,
                          bool inline_kv) {
  grpc::ClientContext context;
  v1::PrefillRequest request;
  for (uint32_t i = 0; i < 3000; ++i) request.add_token_ids(i % 128);
  if (inline_kv) request.mutable_delivery()->mutable_inline_();
  auto reader = v1::Prefill::NewStub(channel)->Prefill(&context, request);
  Hang();
}

[[noreturn]] void Fetch(const std::shared_ptr<grpc::Channel>& channel,
                        const char* handle, const char* epoch) {
  grpc::ClientContext context;
  v1::FetchRequest request;
  request.mutable_ticket()->set_handle(handle);
  request.mutable_ticket()->set_epoch(std::strtoull(epoch, nullptr, 10));
  auto reader = v1::KvSource::NewStub(channel)->Fetch(&context, request);
  Hang();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 2 ? argv[2] : "";
  if (argc < 3) return 2;
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // else it takes far ahead
  const auto channel =
      grpc::CreateCustomChannel(argv[1], grpc::InsecureChannelCredentials(), arguments);
  if (what == "upload") Upload(channel);
  if (what == "prefill" || what == "inline") Prefill(channel, what == "inline");
  if (what == "fetch" && argc == 5) Fetch(channel, argv[3], argv[4]);
  std::fprintf(stderr, "hanging_client: see the first lines of its source\n");
  return 2;
}
