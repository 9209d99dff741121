// Spec: cuda/backend/later_copies.h in both directions, over an emulated device.
#include "cuda/backend/later_copies.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cuda/backend/staged_copies.h"
#include "emulator/emulated_driver.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

using cuda::LaterCopies;
using cuda::StagedCopies;
using cuda::StagingRing;
using cuda::StreamId;
using testing::HasSubstr;

constexpr int64_t kPiece = StagingRing::kPieceBytes;
constexpr int64_t kRing = StagingRing::kNumPieces * kPiece;

struct Direction {
  const char* name;
  StreamId stream;
};

void PrintTo(const Direction& direction, std::ostream* out) { *out << direction.name; }

// What was told to a list of copies, in the order in which it was told.
struct Told {
  std::function<void(const Status&)> Listener(int copy) {
    return [this, copy](const Status& status) {
      const std::lock_guard lock(mutex);
      order.push_back(copy);
      statuses.push_back(status);
    };
  }

  std::mutex mutex;
  std::vector<int> order;
  std::vector<Status> statuses;
};

std::vector<int> UpTo(size_t count) {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

std::vector<uint8_t> RandomBytes(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

// Copies of given sizes, each between host and device memory of its own.
class Copies {
 public:
  Copies(const EmulatedOptions& options, StreamId stream,
         const std::vector<int64_t>& sizes)
      : driver_(options), stream_(stream) {
    staged_ = *StagedCopies::Create(driver_, StreamId::kCompute);
    later_ = *LaterCopies::Create(driver_, stream);
    bytes_before_ = driver_.bytes_held();
    for (const int64_t size : sizes) Place(size);
  }
  ~Copies() {
    later_.reset();
    for (void* memory : device_) {
      if (memory != nullptr) driver_.Free(memory);
    }
    EXPECT_EQ(driver_.bytes_held(),
              bytes_before_ - kRing);  // that of the copies, gone already
  }

  // What is told to have arrived must have by then.
  void Add(int copy) {
    const auto i = static_cast<size_t>(copy);
    const auto bytes = static_cast<int64_t>(host_[i].size());
    const bool upload = stream_ == StreamId::kUpload;
    const void* source = upload ? host_[i].data() : device_[i];
    void* target = upload ? device_[i] : host_[i].data();
    // Nobody waits for what the download is to bring. Where it breaks, so does that.
    if (!upload) {
      static_cast<void>(staged_->ToDevice(expected_[i].data(), device_[i], bytes));
    }
    later_->Add(source, target, bytes,
                [=, this, tell = told.Listener(copy)](const Status& status) {
                  EXPECT_TRUE(!status.ok() || bytes == 0 ||
                              std::memcmp(target, expected_[i].data(),
                                          static_cast<size_t>(bytes)) == 0)
                      << "copy " << copy;
                  tell(status);
                });
  }
  // Waits for all: what was added is done before its end.
  void End() { later_.reset(); }
  void ExpectAllOk() {
    for (const Status& status : told.statuses) {
      EXPECT_TRUE(status.ok()) << status.ToString();
    }
  }
  LaterCopies& later() { return *later_; }
  EmulatedDriver& driver() { return driver_; }

  Told told;

 private:
  void Place(int64_t size) {
    const auto seed = static_cast<uint32_t>(expected_.size());
    expected_.push_back(RandomBytes(size, seed));
    host_.push_back(stream_ == StreamId::kUpload
                        ? expected_.back()
                        : std::vector<uint8_t>(static_cast<size_t>(size)));
    device_.push_back(nullptr);
    if (size == 0) return;
    const bool upload = stream_ == StreamId::kUpload;
    const auto data = driver_.Allocate(upload ? stream_ : StreamId::kCompute, size);
    if (data.ok()) device_.back() = *data;
  }

  EmulatedDriver driver_;
  const StreamId stream_;
  std::unique_ptr<StagedCopies> staged_;
  std::unique_ptr<LaterCopies> later_;
  int64_t bytes_before_ = 0;
  std::vector<std::vector<uint8_t>> host_, expected_;
  std::vector<void*> device_;
};

class LaterCopiesSpec : public testing::TestWithParam<Direction> {};

const std::vector<int64_t> kSizes = {0,
                                     1,
                                     kPiece - 1,
                                     kPiece,
                                     0,
                                     kPiece + 1,
                                     kRing - 1,
                                     kRing,
                                     kRing + 1,
                                     2,
                                     2 * kRing + kPiece + 7,
                                     0};

TEST_P(LaterCopiesSpec, AnySizeArrivesAndIsToldInOrder) {
  for (const uint32_t seed : {1u, 2u, 3u}) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Copies copies({.seed = seed}, GetParam().stream, kSizes);
    for (const int copy : UpTo(kSizes.size())) copies.Add(copy);
    copies.End();
    EXPECT_EQ(copies.told.order, UpTo(kSizes.size()));
    copies.ExpectAllOk();
  }
}

TEST_P(LaterCopiesSpec, EachIsToldWithoutAnother) {
  Copies copies({}, GetParam().stream, {});
  for (int i = 0; i < 3; ++i) {
    std::promise<Status> told;
    copies.later().Add(nullptr, nullptr, 0,
                       [&](const Status& status) { told.set_value(status); });
    EXPECT_TRUE(told.get_future().get().ok());
  }
}

TEST_P(LaterCopiesSpec, ManySmallOnesArrive) {
  std::vector<int64_t> sizes(500);
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = static_cast<int64_t>(i % 97);
  Copies copies({}, GetParam().stream, sizes);
  for (const int copy : UpTo(sizes.size())) copies.Add(copy);
  copies.End();
  EXPECT_EQ(copies.told.order, UpTo(sizes.size()));
  copies.ExpectAllOk();
}

TEST_P(LaterCopiesSpec, WhoeverIsToldMayAdd) {
  Copies copies({}, GetParam().stream, {kPiece, 100});
  std::promise<void> added;
  copies.later().Add(nullptr, nullptr, 0, [&](const Status&) {
    copies.Add(0);
    copies.Add(1);
    added.set_value();
  });
  added.get_future().wait();
  copies.End();
  EXPECT_EQ(copies.told.order, UpTo(2));
  copies.ExpectAllOk();
}

TEST_P(LaterCopiesSpec, ThreadsMayAddAtOnce) {
  constexpr int kThreads = 4;
  constexpr int kCopiesOfEach = 50;
  Copies copies({}, GetParam().stream, {});
  std::atomic<int> told = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&] {
      for (int i = 0; i < kCopiesOfEach; ++i) {
        copies.later().Add(nullptr, nullptr, 0, [&](const Status&) { ++told; });
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  copies.End();
  EXPECT_EQ(told, kThreads * kCopiesOfEach);
}

// Wherever the device breaks: each is told once and in order, the last one of its
// error, and nothing hangs or is kept.
TEST_P(LaterCopiesSpec, ABrokenDeviceEndsEveryCopyWithItsReason) {
  const std::vector<int64_t> sizes = {100, kRing + 1, 0, kPiece, 3};
  int broken_runs = 0;
  for (int64_t breaks_at = 1;; ++breaks_at) {
    SCOPED_TRACE(testing::Message() << "breaks at " << breaks_at);
    Copies copies({.breaks_at = breaks_at}, GetParam().stream, sizes);
    for (const int copy : UpTo(sizes.size())) copies.Add(copy);
    copies.End();
    EXPECT_EQ(copies.told.order, UpTo(sizes.size()));
    if (copies.driver().Health().ok()) break;
    ++broken_runs;
    EXPECT_FALSE(copies.told.statuses.back().ok());
    for (const Status& status : copies.told.statuses) {
      if (!status.ok()) {
        EXPECT_THAT(status.message(), HasSubstr("the device broke"));
      }
    }
  }
  EXPECT_GT(broken_runs, 10);
}

INSTANTIATE_TEST_SUITE_P(Directions, LaterCopiesSpec,
                         testing::Values(Direction{"uploads", StreamId::kUpload},
                                         Direction{"downloads", StreamId::kDownload}),
                         testing_support::CaseName());

}  // namespace
}  // namespace pbs::emulator
