// Cases of bad input for the tables in bad_input_test.cc and bad_attend_test.cc. For
// every input the answer has the right code, the value and the limit. The server stays
// healthy and holds nothing afterwards.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "client/cpp/raw_stream.h"
#include "pbs/v1/attention.pb.h"
#include "pbs/v1/kv.pb.h"
#include "pbs/v1/prefill.pb.h"
#include "proto/wire/messages.h"
#include "tests/integration/test_node.h"

namespace pbs::server {

// One node for all cases, so that a case sees what an earlier one failed to free.
class BadInputNode {
 public:
  static BadInputNode& Get() {
    static BadInputNode node;
    return node;
  }

  // Sends `messages` to a method and returns its end. Refused writes are no failure:
  // the server may answer before it has everything.
  grpc::Status Call(const std::string& method,
                    const std::vector<grpc::ByteBuffer>& messages) {
    client::RawStream stream(channel_, method, {});
    bool open = true;
    for (const grpc::ByteBuffer& message : messages) {
      open = open && stream.Write(message);
    }
    if (open) stream.WritesDone();
    grpc::ByteBuffer reply;
    while (stream.Read(&reply)) {
    }
    const absl::Status status = stream.Finish();
    return {static_cast<grpc::StatusCode>(status.code()),
            std::string(status.message())};
  }
  grpc::Status Prefill(const std::function<void(v1::PrefillRequest&)>& change) {
    v1::PrefillRequest request = PrefillOf(50);
    change(request);
    return Call("/pbs.v1.Prefill/Prefill", {wire::EncodeMessage(request)});
  }
  grpc::Status Attend(const std::vector<v1::AttendRequest>& messages) {
    std::vector<grpc::ByteBuffer> encoded;
    for (const auto& message : messages)
      encoded.push_back(wire::EncodeMessage(message));
    return Call("/pbs.v1.Attention/Attend", encoded);
  }
  grpc::Status Fetch(const std::function<void(v1::FetchRequest&)>& change) {
    v1::FetchRequest request;
    *request.mutable_ticket() = lease_;
    change(request);
    return Call("/pbs.v1.KvSource/Fetch", {wire::EncodeMessage(request)});
  }
  grpc::Status Ticket(const std::string& method, const v1::KvTicket& ticket) {
    if (method == "Describe") {
      return Call("/pbs.v1.KvSource/Describe", {wire::EncodeMessage(ticket)});
    }
    v1::ReleaseRequest request;  // RenewRequest's first field is the same
    *request.mutable_ticket() = ticket;
    return Call("/pbs.v1.KvSource/" + method, {wire::EncodeMessage(request)});
  }

  const v1::KvTicket& lease() const { return lease_; }
  const v1::KvTicket& released() const { return released_; }

  void ExpectHealthy() {
    EXPECT_TRUE(Eventually([&] { return node_.ledger.bytes_held() == held_; }))
        << "held " << node_.ledger.bytes_held() << " expected " << held_;
    EXPECT_TRUE(client_->GetServerInfo().ok());
    PrefillEvents events;
    EXPECT_TRUE(client_->Prefill(PrefillOf(3), events).ok());
  }

 private:
  static NodeOptions Options() {
    NodeOptions options;
    options.service.limits.attend_tokens_max = 4096;
    options.memory_bytes_max = 64 << 20;
    return options;
  }
  // The bytes of the live lease are counted before another lease exists, because bytes
  // of a released lease may be freed shortly after the reply.
  BadInputNode() {
    PrefillEvents events;
    lease_ = client_->Prefill(LeaseOf(40), events)->ticket();
    EXPECT_TRUE(Eventually([&] { return node_.Running() == 0; }));
    held_ = node_.ledger.bytes_held();
    released_ = client_->Prefill(LeaseOf(40), events)->ticket();
    EXPECT_TRUE(client_->Release(released_).ok());
    EXPECT_TRUE(Eventually([&] { return node_.ledger.bytes_held() == held_; }));
  }

  TestNode node_{Options()};
  std::shared_ptr<grpc::Channel> channel_ = node_.NewChannel();
  std::unique_ptr<client::Client> client_ = node_.NewClient();
  v1::KvTicket lease_, released_;
  int64_t held_ = 0;  // of the one lease that lives
};

struct BadInputCase {
  const char* name;
  std::function<grpc::Status(BadInputNode&)> call;
  grpc::StatusCode code;
  const char* message;
};
inline void ExpectRefused(const BadInputCase& bad) {
  BadInputNode& node = BadInputNode::Get();
  const grpc::Status status = bad.call(node);
  EXPECT_EQ(status.error_code(), bad.code);
  const std::string message = bad.message;
  if (message.starts_with("...")) {  // after a number that the planner decides
    EXPECT_THAT(status.error_message(), testing::EndsWith(message.substr(3)));
  } else {
    EXPECT_EQ(status.error_message(), message);
  }
  node.ExpectHealthy();
}

}  // namespace pbs::server
