// Spec: a streamed copy is a copy, whatever its length and alignment.
#include "proto/wire/stream_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "proto/wire/payload.h"

namespace pbs::wire {
namespace {

std::vector<std::byte> Counting(size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 37 + i / 251);
  return bytes;
}

TEST(StreamCopySpec, CopiesEveryLengthFromAndToEveryAlignmentAndNothingElse) {
  constexpr std::byte kUntouched{0xEE};
  const std::vector<std::byte> source = Counting(600);
  for (size_t size : {0, 1, 15, 63, 64, 65, 127, 128, 129, 500}) {
    for (size_t from = 0; from < 17; ++from) {
      for (size_t to = 0; to < 66; ++to) {
        std::vector<std::byte> target(600, kUntouched);
        StreamCopy(target.data() + to, source.data() + from, size);
        const auto copied = target.begin() + static_cast<ptrdiff_t>(to);
        const auto end = copied + static_cast<ptrdiff_t>(size);
        const auto is_untouched = [](std::byte byte) { return byte == kUntouched; };
        ASSERT_TRUE(
            std::equal(copied, end, source.begin() + static_cast<ptrdiff_t>(from)))
            << size << " bytes from " << from << " to " << to;
        ASSERT_TRUE(std::all_of(target.begin(), copied, is_untouched) &&
                    std::all_of(end, target.end(), is_untouched))
            << size << " bytes from " << from << " to " << to;
      }
    }
  }
}

TEST(PayloadSpec, PiecesGoIntoATensorOfAnySizeInOrder) {
  const std::vector<std::byte> bytes = Counting(50'000);
  Payload payload;
  for (size_t begin = 0, size = 1; begin < bytes.size(); begin += size, size *= 3) {
    payload.Append(
        grpc::Slice(bytes.data() + begin, std::min(size, bytes.size() - begin)));
  }
  for (size_t tensor_bytes : {bytes.size(), kStreamedBytesMin}) {
    std::vector<std::byte> target(bytes.size());
    payload.CopyInto(target.data(), tensor_bytes);
    EXPECT_EQ(target, bytes) << tensor_bytes;
  }
}

}  // namespace
}  // namespace pbs::wire
