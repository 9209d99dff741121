// Spec: server/service/uploads.h.
#include "server/service/uploads.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class UploadsSpec : public testing::Test {
 protected:
  static constexpr int32_t kUploadsMax = 2;

  // Takes a place; what ends the upload is written into `ends_`.
  Uploads::Slot Take() {
    auto slot = uploads_.Take([this](absl::Status status) { ends_.push_back(status); });
    EXPECT_TRUE(slot.ok()) << slot.status();
    return *std::move(slot);
  }
  int32_t Drain() {
    return uploads_.Drain([this] { ++idle_; });
  }

  std::vector<absl::Status> ends_;
  int idle_ = 0;
  Uploads uploads_{kUploadsMax};
};

TEST_F(UploadsSpec, HasPlacesForItsLimitAndGetsThemBack) {
  Uploads::Slot first = Take();
  {
    const Uploads::Slot second = Take();
    EXPECT_EQ(
        uploads_.Take([](absl::Status) {}).status(),
        absl::ResourceExhaustedError("uploads under way reach upload_requests_max 2"));
  }
  EXPECT_EQ(uploads_.size(), 1);
  Uploads::Slot moved = std::move(first);
  EXPECT_EQ(uploads_.size(), 1);
  moved.Reset();
  moved.Reset();
  EXPECT_EQ(uploads_.size(), 0);
}

TEST_F(UploadsSpec, ADrainWithoutUploadsIsIdleAtOnceAndRefusesLaterOnes) {
  EXPECT_EQ(Drain(), 0);
  EXPECT_EQ(idle_, 1);
  EXPECT_EQ(uploads_.Take([](absl::Status) {}).status(), Uploads::Draining());
}

TEST_F(UploadsSpec, ADrainEndsUploadsWithoutAHeaderAndDoesNotWaitForThem) {
  const Uploads::Slot slot = Take();
  EXPECT_EQ(Drain(), 1);
  EXPECT_THAT(
      ends_,
      ElementsAre(absl::UnavailableError("draining: this server takes no new work")));
  EXPECT_EQ(idle_, 1);
}

TEST_F(UploadsSpec, ADrainWaitsForAdmittedUploads) {
  Uploads::Slot first = Take(), second = Take();
  ASSERT_TRUE(first.Admit().ok());
  ASSERT_TRUE(second.Admit().ok());
  EXPECT_EQ(Drain(), 0);
  EXPECT_THAT(ends_, IsEmpty());
  first.Reset();
  EXPECT_EQ(idle_, 0);
  second.Reset();
  EXPECT_EQ(idle_, 1);
}

TEST_F(UploadsSpec, AHeaderThatComesAfterTheDrainIsRefused) {
  Uploads::Slot slot = Take();
  Drain();
  EXPECT_EQ(slot.Admit(), Uploads::Draining());
}

TEST_F(UploadsSpec, ACutEndsEveryUploadAndCountsTheAdmitted) {
  Uploads::Slot with_header = Take();
  const Uploads::Slot without = Take();
  ASSERT_TRUE(with_header.Admit().ok());
  const absl::Status reason = absl::UnavailableError("over");
  EXPECT_EQ(uploads_.Cut(reason), 1);
  EXPECT_THAT(ends_, ElementsAre(reason, reason));
}

TEST_F(UploadsSpec, AnUploadThatIsGoneIsNotEnded) {
  Take().Reset();
  Drain();
  EXPECT_EQ(uploads_.Cut(absl::UnavailableError("over")), 0);
  EXPECT_THAT(ends_, IsEmpty());
}

}  // namespace
}  // namespace pbs::server
