// Spec: server/service/unread_calls.h. What gRPC refuses by itself is told, too.
#include "server/service/unread_calls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <cstddef>

#include "pbs/v1/prefill.grpc.pb.h"
#include "tests/integration/test_node.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

struct UnreadCase {
  const char* name;
  size_t request_id_bytes;
  grpc_compression_algorithm compression;
  grpc::StatusCode code;
};

class UnreadSpec : public testing::TestWithParam<UnreadCase> {};

TEST_P(UnreadSpec, LeavesAnEventAndACount) {
  TestNode node;
  const auto& [name, request_id_bytes, compression, code] = GetParam();
  grpc::ClientContext context;
  context.set_compression_algorithm(compression);
  v1::PrefillRequest request = PrefillOf(5);
  request.set_request_id(std::string(request_id_bytes, 'x'));
  auto reader = v1::Prefill::NewStub(node.NewChannel())->Prefill(&context, request);
  v1::PrefillEvent event;
  EXPECT_FALSE(reader->Read(&event));
  EXPECT_EQ(reader->Finish().error_code(), code);
  for (int look = 0; look <= UnreadCalls::kLooks; ++look) {
    EXPECT_EQ(node.metrics.rpc.unread.Value(), look < UnreadCalls::kLooks ? 0 : 1);
    node.Advance(UnreadCalls::kLookInterval);
  }
  node.Stop();
  const std::string log = node.FlushedLog();
  EXPECT_THAT(log, testing::HasSubstr("\"event\":\"calls_unread\",\"calls\":1"));
  EXPECT_THAT(log, testing::Not(testing::HasSubstr("\"event\":\"call\"")));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, UnreadSpec,
    testing::Values(UnreadCase{"too_long", 6 << 20, GRPC_COMPRESS_NONE,
                               grpc::StatusCode::RESOURCE_EXHAUSTED},
                    UnreadCase{"compressed", 100'000, GRPC_COMPRESS_GZIP,
                               grpc::StatusCode::UNIMPLEMENTED}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
