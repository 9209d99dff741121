// Spec: server/codec/push_header.h.
#include "server/codec/push_header.h"

#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <string>

#include "proto/wire/messages.h"

namespace pbs::server {
namespace {

constexpr KvShape kShape = {.num_layers = 3,
                            .num_kv_heads = 2,
                            .head_dim = 64,
                            .capacity = 100,
                            .dtype = DType::kF32};

PushFacts Facts() {
  return {.transfer_id = std::string(32, 'a'),
          .request_id = "r",
          .model = "m",
          .model_digest = "d",
          .sparsity_digest = "s",
          .prompt_digest = "p",
          .epoch = 7,
          .bytes = 153'600};
}

v1::KvChunk Decoded(const KvFormat& format) {
  v1::KvChunk message;
  EXPECT_TRUE(
      wire::DecodeMessage(EncodePushHeader(Facts(), kShape, format), &message).ok());
  return message;
}

TEST(PushHeader, HasEveryFactAndNothingBesideTheHeader) {
  v1::KvChunk expected;
  v1::KvPushHeader& header = *expected.mutable_push_header();
  header.set_transfer_id(std::string(32, 'a'));
  header.set_request_id("r");
  header.set_model("m");
  header.set_model_digest("d");
  header.set_sparsity_digest("s");
  header.set_prompt_digest("p");
  header.mutable_shape()->set_num_layers(3);
  header.mutable_shape()->set_num_kv_heads(2);
  header.mutable_shape()->set_head_dim(64);
  header.mutable_shape()->set_dtype(v1::F32);
  header.set_num_tokens(100);
  header.set_epoch(7);
  header.set_dtype(v1::BF16);
  header.set_layout(v1::NHD);
  header.set_page_tokens(16);
  header.set_checksums(true);
  header.set_bytes(153'600);
  const v1::KvChunk made =
      Decoded({.dtype = DType::kBF16, .layout = KvLayout::kNhd, .page_tokens = 16});
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(made, expected))
      << made.DebugString();
}

TEST(PushHeader, NamesTheHeldDtypeWhenNoneWasAskedFor) {
  const v1::KvPushHeader header = Decoded({.checksums = false}).push_header();
  EXPECT_EQ(header.dtype(), v1::F32);
  EXPECT_EQ(header.layout(), v1::HND);
  EXPECT_EQ(header.page_tokens(), 1);
  EXPECT_FALSE(header.checksums());
}

}  // namespace
}  // namespace pbs::server
