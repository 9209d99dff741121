// Client::Attend(): tensors up, results down.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"
#include "proto/wire/messages.h"

namespace pbs::client {
namespace {

constexpr char kAttend[] = "/pbs.v1.Attention/Attend";

int64_t ElementBytes(v1::DType dtype) {
  switch (dtype) {
    case v1::I64:
      return 8;
    case v1::F32:
    case v1::I32:
      return 4;
    case v1::F16:
    case v1::BF16:
    case v1::U16:
      return 2;
    default:
      return 0;
  }
}

// The caller's memory lent to gRPC: a call that ends early may leave the transport with
// slices in hand, and the caller must not get his memory back before they are dropped.
class Loan {
 public:
  Loan() : token_(std::make_shared<Token>()), returned_(token_->dropped.get_future()) {}
  ~Loan() {
    token_.reset();
    returned_.wait();
  }

  grpc::Slice Lend(std::span<const std::byte> bytes) const {
    return wire::SliceOf(bytes.data(), bytes.size(), token_);
  }

 private:
  struct Token {
    ~Token() { dropped.set_value(); }
    std::promise<void> dropped;
  };
  std::shared_ptr<Token> token_;  // shared with every slice
  std::future<void> returned_;
};

std::string NameOf(v1::TensorName tensor) {
  return v1::TensorName_IsValid(tensor) ? v1::TensorName_Name(tensor)
                                        : absl::StrCat(static_cast<int>(tensor));
}

// What the reply to `header` must announce. The parts of the lists come together.
std::set<v1::TensorName> WantedBy(const v1::AttendHeader& header) {
  if (header.want().empty()) return {v1::O};
  std::set<v1::TensorName> wanted;
  for (int tensor : header.want()) wanted.insert(static_cast<v1::TensorName>(tensor));
  if (wanted.contains(v1::LIST_OFFSETS) || wanted.contains(v1::LIST_INDICES)) {
    wanted.insert({v1::LIST_OFFSETS, v1::LIST_INDICES});
  }
  return wanted;
}

// Receives the tensors that were asked for: a header that announces them and no others,
// their chunks, the stats.
class ReplyReceiver {
 public:
  ReplyReceiver(std::set<v1::TensorName> wanted, TensorTarget& target)
      : missing_(std::move(wanted)), target_(target) {}

  absl::Status Add(const wire::AttendResponse& message) {
    if (stats_.has_value()) {
      return absl::DataLossError("the reply goes on after its stats");
    }
    if (const auto* header = std::get_if<v1::AttendResponseHeader>(&message)) {
      return Begin(*header);
    }
    if (const auto* chunk = std::get_if<wire::TensorChunk>(&message)) {
      return Put(*chunk);
    }
    if (const auto* stats = std::get_if<v1::AttendStats>(&message)) stats_ = *stats;
    return absl::OkStatus();
  }

  absl::StatusOr<v1::AttendStats> Finish() {
    for (const auto& [tensor, part] : parts_) {
      if (part.received == part.target.size()) continue;
      return absl::DataLossError(absl::StrCat("result ", NameOf(tensor),
                                              " ended at offset ", part.received,
                                              " of ", part.target.size(), " bytes"));
    }
    if (!has_header_ || !stats_.has_value()) {
      return absl::DataLossError("the stream ended without header or stats");
    }
    return *std::move(stats_);
  }

 private:
  struct Part {
    std::span<std::byte> target;
    size_t received = 0;
  };

  absl::Status Begin(const v1::AttendResponseHeader& header) {
    if (std::exchange(has_header_, true)) {
      return absl::DataLossError("the reply has a second header");
    }
    for (const v1::TensorSpec& spec : header.tensors()) {
      const absl::StatusOr<int64_t> bytes = TensorBytes(spec);
      if (!bytes.ok()) return absl::DataLossError(bytes.status().message());
      if (missing_.erase(spec.tensor()) == 0) {
        return absl::DataLossError(absl::StrCat(
            "the reply announces ", NameOf(spec.tensor()), ", unasked or twice"));
      }
      const auto target = target_.Tensor(spec, *bytes);
      if (static_cast<int64_t>(target.size()) != *bytes) {
        return absl::ResourceExhaustedError(absl::StrCat(
            "no memory for ", *bytes, " bytes of result ", NameOf(spec.tensor())));
      }
      parts_[spec.tensor()] = {target, 0};
    }
    if (missing_.empty()) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat("the reply does not announce ", NameOf(*missing_.begin())));
  }

  absl::Status Put(const wire::TensorChunk& chunk) {
    const auto found = parts_.find(chunk.tensor);
    if (found == parts_.end() || chunk.offset != found->second.received ||
        chunk.data.size() > found->second.target.size() - found->second.received) {
      return absl::DataLossError(absl::StrCat("a chunk of result ",
                                              NameOf(chunk.tensor), " at offset ",
                                              chunk.offset, " does not fit there"));
    }
    Part& part = found->second;
    chunk.data.CopyTo(part.target.data() + part.received);
    part.received += chunk.data.size();
    return absl::OkStatus();
  }

  std::set<v1::TensorName> missing_;  // not announced yet
  TensorTarget& target_;
  bool has_header_ = false;
  std::map<v1::TensorName, Part> parts_;
  std::optional<v1::AttendStats> stats_;
};

// False when the call ended before everything was sent.
bool Upload(const v1::AttendHeader& header, std::span<const TensorInput> inputs,
            int32_t chunk_bytes, const Loan& loan, RawStream& stream) {
  v1::AttendRequest first;
  *first.mutable_header() = header;
  if (!stream.Write(wire::EncodeMessage(first))) return false;
  for (const TensorInput& input : inputs) {
    for (size_t offset = 0; offset < input.bytes.size();) {
      const size_t size =
          std::min(static_cast<size_t>(chunk_bytes), input.bytes.size() - offset);
      const wire::TensorChunk chunk = {
          input.spec.tensor(), offset,
          wire::Payload(loan.Lend(input.bytes.subspan(offset, size)))};
      if (!stream.Write(wire::EncodeRequestChunk(chunk))) return false;
      offset += size;
    }
  }
  return stream.WritesDone();
}

}  // namespace

absl::StatusOr<int64_t> TensorBytes(const v1::TensorSpec& spec) {
  constexpr int64_t kBytesMax = int64_t{1} << 50;
  int64_t bytes = ElementBytes(spec.dtype());
  for (int64_t axis : spec.shape()) {
    if (axis < 0 || (axis > 0 && bytes > kBytesMax / axis)) bytes = 0;
    if (bytes == 0) break;
    bytes *= axis;
  }
  const bool empty =
      std::find(spec.shape().begin(), spec.shape().end(), 0) != spec.shape().end();
  if (bytes == 0 && !(empty && ElementBytes(spec.dtype()) > 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", static_cast<int>(spec.tensor()),
                     " has no size: ", spec.ShortDebugString()));
  }
  return bytes;
}

absl::StatusOr<v1::AttendStats> Client::Attend(v1::AttendHeader header,
                                               std::span<const TensorInput> inputs,
                                               TensorTarget& target,
                                               int32_t chunk_bytes,
                                               const CallTerms& terms) {
  header.clear_tensors();
  for (const TensorInput& input : inputs) {
    const absl::StatusOr<int64_t> bytes = TensorBytes(input.spec);
    if (!bytes.ok()) return bytes.status();
    if (*bytes != static_cast<int64_t>(input.bytes.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", v1::TensorName_Name(input.spec.tensor()), " has ",
                       input.bytes.size(), " bytes, its shape says ", *bytes));
    }
    *header.add_tensors() = input.spec;
  }
  const Loan loan;  // outlives the stream
  RawStream stream(channel_, kAttend, terms);
  if (!Upload(header, inputs, chunk_bytes, loan, stream)) {
    const absl::Status status = stream.Finish();
    return status.ok() ? absl::InternalError("the server ended the upload") : status;
  }
  ReplyReceiver receiver(WantedBy(header), target);
  grpc::ByteBuffer message;
  while (stream.Read(&message)) {
    wire::AttendResponse response;
    absl::Status status = FromGrpc(wire::DecodeAttendResponse(message, &response));
    if (!status.ok()) return absl::DataLossError(status.message());
    status = receiver.Add(response);
    if (!status.ok()) return status;
  }
  if (absl::Status status = stream.Finish(); !status.ok()) return status;
  return receiver.Finish();
}

}  // namespace pbs::client
