// A blocking call of raw messages with a completion queue of its own: the calling
// thread does all the work, and no message passes between threads.
//
// Threading: one thread at a time; Cancel() from any thread. Memory: one message in
// each direction.
#pragma once

#include <memory>
#include <string>

#include <google/protobuf/message_lite.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace pbs::client {

struct CallTerms {
  absl::Time deadline = absl::InfiniteFuture();
  // Wait for a broken connection to come back rather than fail at once.
  bool wait_for_ready = false;
};

absl::Status FromGrpc(const grpc::Status& status);

class RawStream {
 public:
  // Starts `method` ("/pbs.v1.KvSource/Fetch").
  RawStream(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
            const CallTerms& terms);
  // Cancels the call if it has not ended.
  ~RawStream();
  RawStream(const RawStream&) = delete;
  RawStream& operator=(const RawStream&) = delete;

  // False when the call has ended; Finish() says why.
  bool Write(const grpc::ByteBuffer& message);
  bool WritesDone();
  // False at the end of the stream.
  bool Read(grpc::ByteBuffer* message);
  // The call's status. Call it once, after Read() or Write() returned false.
  absl::Status Finish();
  // Cancels the call. Safe from any thread.
  void Cancel() { context_.TryCancel(); }

 private:
  // Waits for the operation under way; true when it succeeded.
  bool Await();

  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  bool finished_ = false;
};

// A call of one request and one reply.
absl::Status CallUnary(const std::shared_ptr<grpc::Channel>& channel,
                       const std::string& method, const CallTerms& terms,
                       const google::protobuf::MessageLite& request,
                       google::protobuf::MessageLite* reply);

}  // namespace pbs::client
