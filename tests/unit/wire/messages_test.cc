// Spec: proto/wire/messages.h. Protobuf's own encoder and parser are the oracle.
#include "proto/wire/messages.h"

#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <variant>
#include <vector>

#include "proto/wire/field_tags.h"
#include "tests/support/case_name.h"

namespace pbs::wire {
namespace {

using google::protobuf::util::MessageDifferencer;

std::string Flatten(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(!buffer.Valid() || buffer.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

std::string Flatten(const Payload& payload) {
  std::string bytes(payload.size(), '\0');
  payload.CopyTo(reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

// `bytes` in slices of random sizes, empty ones among them.
grpc::ByteBuffer Sliced(const std::string& bytes, std::mt19937& rng) {
  std::vector<grpc::Slice> slices;
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t size = std::min<size_t>(rng() % 40, bytes.size() - begin);
    slices.emplace_back(bytes.data() + begin, size);
    begin += size;
  }
  return {slices.data(), slices.size()};
}

grpc::ByteBuffer OneSlice(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return {&slice, 1};
}

std::string RandomBytes(size_t size, std::mt19937& rng) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(rng());
  return bytes;
}

// Zero, small, negative and extreme values with equal chance.
int32_t RandomInt(std::mt19937& rng) {
  const int32_t choices[] = {0,
                             static_cast<int32_t>(rng() % 200),
                             static_cast<int32_t>(rng()),
                             -1,
                             INT32_MAX,
                             INT32_MIN};
  return choices[rng() % std::size(choices)];
}

uint64_t RandomU64(std::mt19937& rng) {
  return rng() % 3 == 0 ? 0 : (uint64_t{rng()} << 32 | rng()) >> rng() % 64;
}

v1::KvChunk RandomKvChunk(std::mt19937& rng) {
  v1::KvChunk chunk;
  chunk.set_ticket_epoch(RandomU64(rng));
  chunk.set_layer(RandomInt(rng));
  chunk.set_kind(static_cast<v1::KvChunk::Kind>(RandomInt(rng)));
  chunk.set_token_begin(RandomInt(rng));
  chunk.set_token_count(RandomInt(rng));
  chunk.set_head_begin(RandomInt(rng));
  chunk.set_head_count(RandomInt(rng));
  chunk.set_dtype(static_cast<v1::DType>(RandomInt(rng)));
  chunk.set_layout(static_cast<v1::KvLayout>(RandomInt(rng)));
  chunk.set_byte_offset(RandomU64(rng));
  if (rng() % 2 == 0) chunk.set_crc32c(rng() % 2 == 0 ? 0 : rng());
  if (rng() % 2 == 0) chunk.set_layer_digest(rng());
  if (rng() % 2 == 0) chunk.set_scales(RandomBytes(rng() % 400, rng));
  chunk.set_region_offset(RandomU64(rng));
  chunk.set_payload(RandomBytes(rng() % 3 * (rng() % 300), rng));
  return chunk;
}

v1::TensorChunk RandomTensorChunk(std::mt19937& rng) {
  v1::TensorChunk chunk;
  chunk.set_tensor(static_cast<v1::TensorName>(RandomInt(rng)));
  chunk.set_offset(RandomU64(rng));
  chunk.set_data(RandomBytes(rng() % 3 * (rng() % 300), rng));
  return chunk;
}

// Our structs from protobuf's messages, the payload in two slices.
Payload PayloadOf(const std::string& bytes) {
  Payload payload;
  payload.Append(grpc::Slice(bytes.substr(0, bytes.size() / 2)));
  payload.Append(grpc::Slice(bytes.substr(bytes.size() / 2)));
  return payload;
}

KvChunk OurKvChunk(const v1::KvChunk& m) {
  KvChunk chunk;
  chunk.ticket_epoch = m.ticket_epoch();
  chunk.layer = m.layer();
  chunk.kind = m.kind();
  chunk.token_begin = m.token_begin();
  chunk.token_count = m.token_count();
  chunk.head_begin = m.head_begin();
  chunk.head_count = m.head_count();
  chunk.dtype = m.dtype();
  chunk.layout = m.layout();
  chunk.byte_offset = m.byte_offset();
  chunk.region_offset = m.region_offset();
  if (m.has_crc32c()) chunk.crc32c = m.crc32c();
  if (m.has_layer_digest()) chunk.layer_digest = m.layer_digest();
  chunk.scales = PayloadOf(m.scales());
  chunk.payload = PayloadOf(m.payload());
  return chunk;
}

TensorChunk OurTensorChunk(const v1::TensorChunk& m) {
  return {m.tensor(), m.offset(), PayloadOf(m.data())};
}

v1::KvChunk TheirKvChunk(const KvChunk& chunk) {
  v1::KvChunk m;
  m.set_ticket_epoch(chunk.ticket_epoch);
  m.set_layer(chunk.layer);
  m.set_kind(chunk.kind);
  m.set_token_begin(chunk.token_begin);
  m.set_token_count(chunk.token_count);
  m.set_head_begin(chunk.head_begin);
  m.set_head_count(chunk.head_count);
  m.set_dtype(chunk.dtype);
  m.set_layout(chunk.layout);
  m.set_byte_offset(chunk.byte_offset);
  m.set_region_offset(chunk.region_offset);
  if (chunk.crc32c.has_value()) m.set_crc32c(*chunk.crc32c);
  if (chunk.layer_digest.has_value()) m.set_layer_digest(*chunk.layer_digest);
  m.set_scales(Flatten(chunk.scales));
  m.set_payload(Flatten(chunk.payload));
  return m;
}

v1::TensorChunk TheirTensorChunk(const TensorChunk& chunk) {
  v1::TensorChunk m;
  m.set_tensor(chunk.tensor);
  m.set_offset(chunk.offset);
  m.set_data(Flatten(chunk.data));
  return m;
}

constexpr uint32_t kSeeds = 2000;

TEST(WireSpec, WhatWeEncodeProtobufParsesToAnEqualMessage) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed=" << seed);
    std::mt19937 rng(seed);
    const v1::KvChunk kv = RandomKvChunk(rng);
    const v1::TensorChunk tensor = RandomTensorChunk(rng);

    v1::KvChunk kv_back;
    ASSERT_TRUE(kv_back.ParseFromString(Flatten(EncodeKvChunk(OurKvChunk(kv)))));
    ASSERT_TRUE(MessageDifferencer::Equals(kv_back, kv));
    v1::PrefillEvent event;
    ASSERT_TRUE(event.ParseFromString(Flatten(EncodeKvEvent(OurKvChunk(kv)))));
    ASSERT_TRUE(MessageDifferencer::Equals(event.kv(), kv));
    v1::AttendRequest request;
    ASSERT_TRUE(
        request.ParseFromString(Flatten(EncodeRequestChunk(OurTensorChunk(tensor)))));
    ASSERT_TRUE(MessageDifferencer::Equals(request.chunk(), tensor));
    v1::AttendResponse response;
    ASSERT_TRUE(
        response.ParseFromString(Flatten(EncodeResponseChunk(OurTensorChunk(tensor)))));
    ASSERT_TRUE(MessageDifferencer::Equals(response.chunk(), tensor));
  }
}

TEST(WireSpec, WhatProtobufEncodesWeDecodeToAnEqualMessageHoweverItIsSliced) {
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed=" << seed);
    std::mt19937 rng(seed);
    const v1::KvChunk kv = RandomKvChunk(rng);
    v1::PrefillEvent event;
    *event.mutable_kv() = kv;
    v1::AttendRequest request;
    *request.mutable_chunk() = RandomTensorChunk(rng);

    KvChunk kv_back;
    ASSERT_TRUE(DecodeKvChunk(Sliced(kv.SerializeAsString(), rng), &kv_back).ok());
    ASSERT_TRUE(MessageDifferencer::Equals(TheirKvChunk(kv_back), kv));
    PrefillEvent event_back;
    ASSERT_TRUE(
        DecodePrefillEvent(Sliced(event.SerializeAsString(), rng), &event_back).ok());
    ASSERT_TRUE(
        MessageDifferencer::Equals(TheirKvChunk(std::get<KvChunk>(event_back)), kv));
    AttendRequest request_back;
    ASSERT_TRUE(
        DecodeAttendRequest(Sliced(request.SerializeAsString(), rng), &request_back)
            .ok());
    ASSERT_TRUE(MessageDifferencer::Equals(
        TheirTensorChunk(std::get<TensorChunk>(request_back)), request.chunk()));
  }
}

TEST(WireSpec, OrdinaryMembersDecodeToo) {
  std::mt19937 rng(1);
  v1::AttendRequest request;
  request.mutable_header()->set_request_id(std::string(100, 'r'));
  request.mutable_header()->add_want(v1::LSE);
  AttendRequest request_back;
  ASSERT_TRUE(
      DecodeAttendRequest(Sliced(request.SerializeAsString(), rng), &request_back)
          .ok());
  EXPECT_TRUE(MessageDifferencer::Equals(std::get<v1::AttendHeader>(request_back),
                                         request.header()));

  v1::AttendResponse response;
  response.mutable_stats()->set_density(0.5);
  AttendResponse response_back;
  ASSERT_TRUE(
      DecodeAttendResponse(Sliced(response.SerializeAsString(), rng), &response_back)
          .ok());
  EXPECT_EQ(std::get<v1::AttendStats>(response_back).density(), 0.5);

  v1::PrefillEvent event;
  event.mutable_done()->set_first_token_id(7);
  PrefillEvent event_back;
  ASSERT_TRUE(
      DecodePrefillEvent(Sliced(event.SerializeAsString(), rng), &event_back).ok());
  EXPECT_EQ(std::get<v1::Done>(event_back).first_token_id(), 7u);

  v1::Done done;
  ASSERT_TRUE(DecodeMessage(EncodeMessage(event.done()), &done).ok());
  EXPECT_TRUE(MessageDifferencer::Equals(done, event.done()));
}

TEST(WireSpec, ThePayloadIsNotCopied) {
  const std::string bytes(1 << 20, 'p');
  const grpc::Slice source(bytes.data(), bytes.size(), grpc::Slice::STATIC_SLICE);
  KvChunk chunk;
  chunk.layer = 3;
  chunk.payload = Payload(source);
  const grpc::ByteBuffer encoded = EncodeKvChunk(chunk);
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(encoded.Dump(&slices).ok());
  ASSERT_EQ(slices.size(), 2u);
  EXPECT_EQ(slices[1].begin(), source.begin());

  KvChunk back;
  ASSERT_TRUE(DecodeKvChunk(encoded, &back).ok());
  ASSERT_EQ(back.payload.pieces().size(), 1u);
  EXPECT_EQ(back.payload.pieces()[0].begin(), source.begin());
}

// Hand-made bytes. `Field` is a length-delimited field.
std::string Varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes + static_cast<char>(value);
}
std::string Int(uint32_t field, uint64_t value) {
  return Varint(Tag(field, kVarint)) + Varint(value);
}
std::string Field(uint32_t field, const std::string& bytes) {
  return Varint(Tag(field, kLength)) + Varint(bytes.size()) + bytes;
}
std::string Group(uint32_t field, const std::string& inside) {
  return Varint(Tag(field, kStartGroup)) + inside + Varint(Tag(field, kEndGroup));
}
std::string NestedGroups(int depth) {
  return depth == 0 ? "" : Group(9, NestedGroups(depth - 1));
}

struct AcceptedCase {
  const char* name;
  std::string bytes;  // an AttendRequest
};

class AcceptedSpec : public testing::TestWithParam<AcceptedCase> {};

TEST_P(AcceptedSpec, ReadsWhatProtobufReads) {
  v1::AttendRequest theirs;
  ASSERT_TRUE(theirs.ParseFromString(GetParam().bytes));
  theirs.DiscardUnknownFields();
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 rng(seed);
    AttendRequest ours;
    const grpc::Status status =
        DecodeAttendRequest(Sliced(GetParam().bytes, rng), &ours);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ASSERT_EQ(std::holds_alternative<std::monostate>(ours),
              theirs.message_case() == v1::AttendRequest::MESSAGE_NOT_SET);
    if (const auto* chunk = std::get_if<TensorChunk>(&ours)) {
      EXPECT_TRUE(MessageDifferencer::Equals(TheirTensorChunk(*chunk), theirs.chunk()));
    }
    if (const auto* header = std::get_if<v1::AttendHeader>(&ours)) {
      EXPECT_EQ(header->request_id(), theirs.header().request_id());
      EXPECT_EQ(header->warmup(), theirs.header().warmup());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, AcceptedSpec,
    testing::Values(
        AcceptedCase{"empty", ""},
        AcceptedCase{"fields_in_any_order",
                     Field(2, Field(15, "data") + Int(2, 4096) + Int(1, 3))},
        AcceptedCase{"payload_twice_last_wins",
                     Field(2, Field(15, "old") + Int(1, 1) + Field(15, "new!"))},
        AcceptedCase{"payload_set_and_emptied",
                     Field(2, Field(15, "x") + Field(15, ""))},
        AcceptedCase{"same_member_twice_merges",
                     Field(2, Int(1, 2) + Field(15, "kept")) + Field(2, Int(2, 64))},
        AcceptedCase{"chunk_then_header",
                     Field(2, Int(1, 2)) + Field(1, Field(1, "id"))},
        AcceptedCase{"header_then_chunk",
                     Field(1, Field(1, "id")) + Field(2, Int(1, 2))},
        AcceptedCase{"header_chunk_header_starts_afresh",
                     Field(1, Field(1, "id")) + Field(2, "") + Field(1, Int(9, 5))},
        AcceptedCase{"unknown_fields_of_every_type",
                     Int(99, 7) + Field(2, Int(50, UINT64_MAX) + Field(51, "skip") +
                                               Varint(Tag(52, kFixed64)) + "12345678" +
                                               Varint(Tag(53, kFixed32)) + "1234" +
                                               Field(15, "data"))},
        AcceptedCase{"unknown_group", Field(2, NestedGroups(10) + Int(1, 1))},
        AcceptedCase{"known_field_with_another_wire_type",
                     Field(2, Field(1, "not an enum") + Int(15, 3))},
        AcceptedCase{"enum_outside_its_values", Field(2, Int(1, 1000))},
        AcceptedCase{"negative_enum", Field(2, Int(1, UINT64_MAX))},
        AcceptedCase{"overlong_varint",
                     Field(2, "\x08\x83\x80" + std::string(1, '\0'))}),
    testing_support::CaseName());

struct RefusedCase {
  const char* name;
  std::string bytes;  // an AttendRequest
  const char* message;
};

class RefusedSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedSpec, IsRefusedWithThePlace) {
  v1::AttendRequest theirs;
  EXPECT_FALSE(theirs.ParseFromString(GetParam().bytes));
  AttendRequest ours;
  const grpc::Status status = DecodeAttendRequest(OneSlice(GetParam().bytes), &ours);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedSpec,
    testing::Values(
        RefusedCase{"length_past_the_end", Varint(Tag(2, kLength)) + "\x05" + "ab",
                    "malformed AttendRequest at byte 2 of 4"},
        RefusedCase{"payload_past_its_message", Field(2, "\x7A\x64"),
                    "malformed AttendRequest at byte 4 of 4"},
        RefusedCase{"length_of_2_to_the_64", Field(2, "\x7A" + Varint(UINT64_MAX)),
                    "malformed AttendRequest at byte 13 of 13"},
        RefusedCase{"endless_varint", Field(2, "\x08" + std::string(11, '\xFF')),
                    "malformed AttendRequest at byte 3 of 14"},
        RefusedCase{"cut_in_a_varint", Field(2, "\x08\x80"),
                    "malformed AttendRequest at byte 4 of 4"},
        RefusedCase{"cut_in_a_fixed32", Varint(Tag(9, kFixed32)) + "ab",
                    "malformed AttendRequest at byte 3 of 3"},
        RefusedCase{"field_number_zero", std::string("\x00\x01", 2),
                    "malformed AttendRequest at byte 1 of 2"},
        RefusedCase{"field_number_zero_with_a_type", "\x01" + std::string(8, 'x'),
                    "malformed AttendRequest at byte 1 of 9"},
        RefusedCase{"wire_type_6", "\x0E", "malformed AttendRequest at byte 1 of 1"},
        RefusedCase{"end_group_alone", Varint(Tag(9, kEndGroup)),
                    "malformed AttendRequest at byte 1 of 1"},
        RefusedCase{"end_group_in_a_header", Field(1, Varint(Tag(9, kEndGroup))),
                    "malformed AttendRequest at byte 3 of 3"},
        RefusedCase{"group_never_ends", Varint(Tag(9, kStartGroup)),
                    "malformed AttendRequest at byte 1 of 1"},
        RefusedCase{"group_ends_as_another", "\x4B\x54",
                    "malformed AttendRequest at byte 2 of 2"},
        RefusedCase{"groups_too_deep", NestedGroups(200),
                    "malformed AttendRequest at byte 65 of 400"},
        RefusedCase{"string_that_is_no_utf8", Field(1, Field(1, "\xFF\xFE")),
                    "malformed AttendRequest at byte 6 of 6"}),
    testing_support::CaseName());

TEST(WireSpec, EveryTruncationOfAChunkIsRefused) {
  std::mt19937 rng(5);
  v1::AttendRequest request;
  request.mutable_chunk()->set_tensor(v1::V);
  request.mutable_chunk()->set_offset(1 << 20);
  request.mutable_chunk()->set_data("0123456789");
  const std::string whole = request.SerializeAsString();
  for (size_t size = 1; size < whole.size(); ++size) {
    AttendRequest out;
    EXPECT_FALSE(DecodeAttendRequest(Sliced(whole.substr(0, size), rng), &out).ok())
        << "size " << size;
  }
}

TEST(WireSpec, ARefusedOrdinaryMessageIsNamed) {
  v1::KvTicket ticket;
  const grpc::Status status = DecodeMessage(OneSlice("\x0A\x05x"), &ticket);
  EXPECT_EQ(status.error_message(), "malformed pbs.v1.KvTicket of 3 bytes");
}

}  // namespace
}  // namespace pbs::wire
