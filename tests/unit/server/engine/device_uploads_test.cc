// Spec: server/engine/device_uploads.h, what goes when.
#include "server/engine/device_uploads.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <semaphore>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/device_backend.h"

namespace pbs::server {
namespace {

using testing_support::DeviceBackend;

class DeviceUploadsSpec : public testing::Test {
 protected:
  // An upload of `name`.size() tensors, named after the letters.
  DeviceUploads::Handle Add(const std::string& name) {
    UploadSource source;
    source.q = *HostBytes::Allocate(static_cast<int64_t>(name.size()));
    std::memcpy(source.q.data(), name.data(), name.size());
    std::vector<TensorCopy> copies;
    for (size_t i = 0; i < name.size(); ++i) {
      copies.push_back({source.q.data() + i, 1, Buffer()});
    }
    return uploads_.Add(std::move(source), std::move(copies));
  }
  void Begin(const DeviceUploads::Handle& upload) {
    uploads_.Begin(DeviceUploads::IdOf(upload));
  }
  std::string Letters(const DeviceUploads::Handle& upload) {
    const auto copies = uploads_.Wait(upload, {});
    if (!copies.ok()) return copies.status().ToString();
    std::string letters;
    for (const TensorCopy& copy : *copies) {
      letters += *static_cast<const char*>(copy.target.data());
    }
    return letters;
  }

  // Letters, and '.' for room, of what was sent, when it is so much.
  std::string Sent(int count) {
    for (int i = 0; i < count; ++i) arrived_.acquire();
    return sent_;
  }

  std::string sent_;  // the thread of uploads writes it
  std::counting_semaphore<> arrived_{0};
  DeviceBackend device_{{
      .on_upload =
          [this](const void* source) {
            sent_ += source == nullptr ? '.' : *static_cast<const char*>(source);
          },
      .on_uploaded = [this] { arrived_.release(); },
  }};
  DeviceUploads uploads_{device_};
};

TEST_F(DeviceUploadsSpec, NothingHappensBeforeItBegins) {
  const auto upload = Add("abc");
  const auto next = Add("x");
  EXPECT_EQ(Letters(next), "x");
  EXPECT_EQ(Sent(2), ".x");
}

TEST_F(DeviceUploadsSpec, BringsAllTensors) {
  const auto upload = Add("abcde");
  Begin(upload);
  EXPECT_EQ(Letters(upload), "abcde");
  EXPECT_EQ(Letters(upload), "abcde");
}

TEST_F(DeviceUploadsSpec, AnUploadWithoutTensorsEnds) {
  const auto upload = Add("");
  Begin(upload);
  EXPECT_EQ(Letters(upload), "");
}

TEST_F(DeviceUploadsSpec, WaitingBeginsIt) {
  const auto upload = Add("abc");
  EXPECT_EQ(Letters(upload), "abc");
}

TEST_F(DeviceUploadsSpec, LargeTensorsGoInParts) {
  constexpr int64_t kBytes = 2 * DeviceUploads::kPartBytes + 1;
  UploadSource source;
  source.q = *HostBytes::Allocate(kBytes);
  for (int64_t i = 0; i < kBytes; i += 1000) source.q.data()[i] = std::byte(i % 251);
  source.q.data()[kBytes - 1] = std::byte{7};
  std::vector<TensorCopy> copies(1);
  copies[0].source = source.q.data();
  copies[0].bytes = kBytes;
  const std::byte* expected = source.q.data();
  const auto upload = uploads_.Add(std::move(source), std::move(copies));
  const auto arrived = uploads_.Wait(upload, {});
  ASSERT_TRUE(arrived.ok()) << arrived.status();
  EXPECT_EQ(std::memcmp(arrived->front().target.data(), expected, kBytes), 0);
  EXPECT_EQ(Sent(1 + 3).size(), 1u + 3u);
}

TEST_F(DeviceUploadsSpec, GoesUploadByUpload) {
  device_.uploads().HoldAfter(0);
  const auto first = Add("abc"), second = Add("uvw");
  Begin(first);
  Begin(second);
  device_.uploads().Release();
  EXPECT_EQ(Sent(8), "..abcuvw");
}

// Room for the first two is under way by then.
TEST_F(DeviceUploadsSpec, WhatIsWaitedForOvertakesTheOthers) {
  device_.uploads().HoldAfter(0);
  const auto first = Add("abc"), second = Add("def"), third = Add("uvw");
  for (const auto* upload : {&first, &second, &third}) Begin(*upload);
  const std::atomic<bool> stop = true;
  EXPECT_TRUE(absl::IsCancelled(uploads_.Wait(third, {&stop}).status()));
  device_.uploads().Release();
  const std::string sent = Sent(12);
  EXPECT_TRUE(sent.starts_with("...")) << sent;
  EXPECT_LT(sent.find('w'), sent.find('b')) << sent;
}

TEST_F(DeviceUploadsSpec, ADroppedOneBeginsNothingMore) {
  device_.uploads().HoldAfter(1);
  auto dropped = Add("abcdef");
  const auto next = Add("x");
  Begin(dropped);
  EXPECT_EQ(Sent(1), ".");
  dropped.reset();
  Begin(next);
  device_.uploads().Release();
  EXPECT_EQ(Letters(next), "x");
  EXPECT_EQ(Sent(DeviceUploads::kPartsUnderWay + 2), ".ab.x");
}

TEST_F(DeviceUploadsSpec, BeginOfADroppedOneDoesNothing) {
  auto upload = Add("abc");
  const UploadId id = DeviceUploads::IdOf(upload);
  upload.reset();
  uploads_.Begin(id);
  const auto next = Add("x");
  EXPECT_EQ(Letters(next), "x");
}

}  // namespace
}  // namespace pbs::server
