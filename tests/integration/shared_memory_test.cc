// Spec: fetches of the C++ client from shared memory, over real gRPC and a real socket.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/transfer/region_server.h"
#include "tests/integration/test_node.h"
#include "tests/support/kv_arrays.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;

class SharedMemorySpec : public testing::TestWithParam<bool> {
 protected:
  SharedMemorySpec() {
    std::string name = testing::TempDir() + "/pbs-shared-XXXXXX";
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    auto created =
        RegionServer::Create({.path = path()}, node_.leases, node_.metrics.kv);
    EXPECT_TRUE(created.ok()) << created.status();
    regions_ = *std::move(created);
  }
  ~SharedMemorySpec() override { std::filesystem::remove_all(folder_); }

  std::string path() const { return folder_ + "/socket"; }
  std::unique_ptr<client::Client> NewClient() const {
    return *client::Client::Connect(
        {.address = node_.address(), .shared_memory_socket = path()});
  }
  v1::FetchRequest Prefill(int32_t num_tokens, uint32_t seed = 1) {
    PrefillEvents events;
    const auto done = node_.NewClient()->Prefill(LeaseOf(num_tokens, seed), events);
    EXPECT_TRUE(done.ok()) << done.status();
    v1::FetchRequest request;
    *request.mutable_ticket() = done->ticket();
    request.set_checksums(GetParam());
    return request;
  }

  TestNode node_{{.shared_caches = true}};
  std::string folder_;
  std::unique_ptr<RegionServer> regions_;
};

TEST_P(SharedMemorySpec, AFetchHasTheBytesOfAPlainOne) {
  const v1::FetchRequest request = Prefill(300);
  KvArrays want, got, again;
  ASSERT_TRUE(node_.NewClient()->Fetch(request, want).ok());
  const auto client = NewClient();
  for (KvArrays* arrays : {&got, &again}) {
    const absl::Status status = client->Fetch(request, *arrays);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(arrays->arrays, want.arrays);
    EXPECT_THAT(arrays->layers, ElementsAre(0, 1, 2));
  }
  EXPECT_EQ(node_.metrics.kv.RegionRequests(RegionResult::kOk).Value(), 1)
      << "the memory of a ticket is mapped once";
}

TEST_P(SharedMemorySpec, ALeaseThatEndsInAFetchIsNotFoundAndGivesNoWrongLayer) {
  const v1::FetchRequest request = Prefill(300);
  KvArrays want, got;
  ASSERT_TRUE(node_.NewClient()->Fetch(request, want).ok());
  got.on_layer = [&](int32_t layer) {
    EXPECT_EQ(got.arrays.at({layer, v1::KvChunk::V}),
              want.arrays.at({layer, v1::KvChunk::V}));
    if (layer > 0) return;
    EXPECT_TRUE(node_.leases.Release(request.ticket()).ok());
    EXPECT_TRUE(node_.NothingHeld());
  };
  const absl::Status status = NewClient()->Fetch(request, got);
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(got.layers, ElementsAre(0));
}

TEST_P(SharedMemorySpec, AnExpiredLeaseIsNotFoundThoughItsMemoryIsMapped) {
  const v1::FetchRequest request = Prefill(300);
  const auto client = NewClient();
  KvArrays arrays;
  ASSERT_TRUE(client->Fetch(request, arrays).ok());
  node_.Advance(absl::Seconds(node_.leases.options().ttl_seconds_default));
  EXPECT_TRUE(node_.NothingHeld());
  arrays.layers.clear();
  EXPECT_TRUE(absl::IsNotFound(client->Fetch(request, arrays)));
  EXPECT_TRUE(arrays.layers.empty());
}

TEST_P(SharedMemorySpec, WithoutItsSocketAFetchIsUnavailableAndNotFromTheNetwork) {
  const v1::FetchRequest request = Prefill(300);
  regions_.reset();
  KvArrays arrays;
  const absl::Status status = NewClient()->Fetch(request, arrays);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_NE(status.message().find(path()), std::string::npos) << status;
  EXPECT_TRUE(arrays.arrays.empty());
  // Who says so gets them from the network.
  v1::FetchRequest plain = request;
  plain.set_shared_memory(false);
  EXPECT_TRUE(NewClient()->Fetch(plain, arrays).ok());
}

TEST_P(SharedMemorySpec, AClientWithoutASocketCannotAskForIt) {
  v1::FetchRequest request = Prefill(10);
  request.set_shared_memory(true);
  KvArrays arrays;
  EXPECT_EQ(node_.NewClient()->Fetch(request, arrays),
            absl::InvalidArgumentError(
                "shared_memory true needs ClientOptions.shared_memory_socket"));
}

TEST_P(SharedMemorySpec, FetchesOfOneClientMayRunSideBySide) {
  const v1::FetchRequest request = Prefill(300);
  KvArrays want;
  ASSERT_TRUE(node_.NewClient()->Fetch(request, want).ok());
  const auto client = NewClient();
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      KvArrays arrays;
      EXPECT_TRUE(client->Fetch(request, arrays).ok());
      EXPECT_EQ(arrays.arrays, want.arrays);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

INSTANTIATE_TEST_SUITE_P(Checksums, SharedMemorySpec, testing::Bool(),
                         [](const auto& checksums) {
                           return checksums.param ? "on" : "off";
                         });

}  // namespace
}  // namespace pbs::server
