#include "client/cpp/bench/upload.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace pbs::bench {
namespace {

constexpr int64_t kHeads = 16, kHeadDim = 128;
constexpr int64_t kKeyBytes = 2 * kHeads * kHeadDim * sizeof(float);  // and its value

using Result = std::vector<float>;  // [heads, 1, head_dim]

class ResultTarget final : public client::TensorTarget {
 public:
  std::span<std::byte> Tensor(const v1::TensorSpec&, int64_t bytes) override {
    values.assign(static_cast<size_t>(bytes) / sizeof(float), NAN);
    return std::as_writable_bytes(std::span(values));
  }
  Result values;
};

// The tensors of one stream's call, in its part of the memory.
struct Tensors {
  explicit Tensors(std::span<const std::byte> part)
      : k_len(static_cast<int64_t>(part.size()) / kKeyBytes),
        k(part.first(part.size() / 2)),
        v(part.subspan(part.size() / 2)) {
    for (size_t i = 0; i < q.size(); ++i) q[i] = std::sin(static_cast<float>(i));
  }

  std::vector<client::TensorInput> Inputs() const {
    const auto input = [](v1::TensorName tensor, int64_t length,
                          std::span<const std::byte> bytes) {
      client::TensorInput made;
      made.spec.set_tensor(tensor);
      made.spec.set_dtype(v1::F32);
      for (int64_t axis : {kHeads, length, kHeadDim}) made.spec.add_shape(axis);
      made.bytes = bytes;
      return made;
    };
    return {input(v1::Q, 1, std::as_bytes(std::span(q))), input(v1::K, k_len, k),
            input(v1::V, k_len, v)};
  }
  const float* Row(std::span<const std::byte> tensor, int64_t head, int64_t key) const {
    return reinterpret_cast<const float*>(tensor.data()) +
           (head * k_len + key) * kHeadDim;
  }

  int64_t k_len;
  std::span<const std::byte> k, v;
  std::vector<float> q = std::vector<float>(kHeads * kHeadDim);
};

v1::AttendHeader Header(std::initializer_list<int64_t> q_ends,
                        std::initializer_list<int64_t> k_ends) {
  v1::AttendHeader header;
  header.mutable_options()->mutable_dense();
  for (int64_t end : q_ends) header.add_cu_seqlens(static_cast<int32_t>(end));
  for (int64_t end : k_ends) header.add_cu_seqlens_k(static_cast<int32_t>(end));
  return header;
}

class Upload final : public Transfer {
 public:
  Upload(const Clients& clients, std::span<const std::byte> memory, int32_t streams,
         int32_t chunk_bytes)
      : Transfer({.direction = "upload", .peer = "pbs", .streams = streams}),
        clients_(clients),
        chunk_bytes_(chunk_bytes),
        results_(static_cast<size_t>(streams)) {
    for (int32_t i = 0; i < streams; ++i) {
      parts_.emplace_back(UploadPart(memory, streams, i));
    }
  }

  int64_t bytes() const override {
    int64_t sum = 0;
    for (const Tensors& part : parts_) sum += part.k_len * kKeyBytes;
    return sum;
  }

  void Prepare() override {
    for (ResultTarget& result : results_) result.values.clear();
  }

  absl::Status Run(int32_t stream) override {
    const Tensors& part = parts_[stream];
    return clients_[stream]
        ->Attend(Header({0, 0, 1}, {0, part.k_len - 1, part.k_len}), part.Inputs(),
                 results_[stream], chunk_bytes_)
        .status();
  }

  absl::Status Check() override {
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Tensors& part = parts_[i];
      const Result& result = results_[i].values;
      bool right = result.size() == kHeads * kHeadDim;
      for (int64_t head = 0; right && head < kHeads; ++head) {
        right = std::memcmp(&result[head * kHeadDim],
                            part.Row(part.v, head, part.k_len - 1),
                            kHeadDim * sizeof(float)) == 0;
      }
      if (!right) {
        return absl::DataLossError(
            absl::StrCat("upload stream ", i, ": the output is not the last value"));
      }
    }
    return absl::OkStatus();
  }

 private:
  const Clients& clients_;
  const int32_t chunk_bytes_;
  std::vector<Tensors> parts_;
  std::vector<ResultTarget> results_;
};

// Softmax attention of head `head`'s one query to every key, in f64.
std::vector<double> Expected(const Tensors& part, int64_t head) {
  const float* q = &part.q[head * kHeadDim];
  std::vector<double> out(kHeadDim);
  double weights = 0;
  for (int64_t key = 0; key < part.k_len; ++key) {
    const float* k = part.Row(part.k, head, key);
    const float* v = part.Row(part.v, head, key);
    double score = 0;
    for (int64_t i = 0; i < kHeadDim; ++i) score += double{q[i]} * k[i];
    const double weight = std::exp(score / std::sqrt(double{kHeadDim}));
    weights += weight;
    for (int64_t i = 0; i < kHeadDim; ++i) out[i] += weight * v[i];
  }
  for (double& value : out) value /= weights;
  return out;
}

}  // namespace

void FillUpload(std::span<std::byte> bytes) {
  auto* values = reinterpret_cast<float*>(bytes.data());
  uint32_t state = 1;
  for (size_t i = 0; i < bytes.size() / sizeof(float); ++i) {
    state = state * 1664525 + 1013904223;
    values[i] = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
  }
}

std::span<const std::byte> UploadPart(std::span<const std::byte> memory,
                                      int32_t streams, int32_t stream) {
  const auto parts = static_cast<size_t>(streams);
  const size_t bytes = memory.size() / parts / kKeyBytes * kKeyBytes;
  return memory.subspan(static_cast<size_t>(stream) * bytes, bytes);
}

std::unique_ptr<Transfer> MakeUpload(const Clients& clients,
                                     std::span<const std::byte> memory, int32_t streams,
                                     int32_t chunk_bytes) {
  return std::make_unique<Upload>(clients, memory, streams, chunk_bytes);
}

absl::Status VerifyUpload(client::Client& client, std::span<const std::byte> part,
                          int32_t chunk_bytes) {
  // f32 sums of the server stay within this of f64; one chunk of 64 KiB that is missing
  // among 4 GiB of values moves the output further.
  constexpr double kTolerance = 5e-6;
  const Tensors tensors(part);
  ResultTarget result;
  const auto stats = client.Attend(Header({0, 1}, {0, tensors.k_len}), tensors.Inputs(),
                                   result, chunk_bytes);
  if (!stats.ok()) return stats.status();
  if (result.values.size() != kHeads * kHeadDim) {
    return absl::DataLossError(absl::StrCat("the output of an upload has ",
                                            result.values.size(), " values, expected ",
                                            kHeads * kHeadDim));
  }
  for (int64_t head = 0; head < kHeads; ++head) {
    const std::vector<double> expected = Expected(tensors, head);
    for (int64_t i = 0; i < kHeadDim; ++i) {
      const float got = result.values[head * kHeadDim + i];
      if (std::abs(got - expected[i]) <= kTolerance) continue;
      return absl::DataLossError(
          absl::StrCat("attention of the uploaded tensors is wrong: head ", head,
                       " element ", i, " is ", got, ", expected ", expected[i]));
    }
  }
  return absl::OkStatus();
}

}  // namespace pbs::bench
