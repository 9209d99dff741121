#include "server/model/digest.h"
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

#include "pbs/check.h"

namespace pbs {
namespace {

std::array<uint8_t, 16> Canonical(XXH128_hash_t hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  std::array<uint8_t, 16> bytes;
  std::copy(std::begin(canonical.digest), std::end(canonical.digest), bytes.begin());
  return bytes;
}

}  // namespace

TensorHash::TensorHash() : state_(XXH3_createState()) {
  PBS_CHECK(state_ != nullptr && XXH3_128bits_reset(state_.get()) == XXH_OK);
}

void TensorHash::Update(const void* data, int64_t bytes) {
  PBS_CHECK(XXH3_128bits_update(state_.get(), data, static_cast<size_t>(bytes)) ==
            XXH_OK);
}

std::array<uint8_t, 16> TensorHash::Finish() const {
  return Canonical(XXH3_128bits_digest(state_.get()));
}

void ModelDigest::Add(const TensorInfo& tensor, const std::array<uint8_t, 16>& hash) {
  std::string& line = tensors_[tensor.name];
  PBS_CHECK(line.empty());
  line = tensor.dtype_name + '\0' + ShapeText(tensor.shape) + '\0';
  line.append(hash.begin(), hash.end());
}

std::string ModelDigest::Finish() const {
  TensorHash all;
  all.Update(architecture_.data(), static_cast<int64_t>(architecture_.size()));
  for (const auto& [name, line] : tensors_) {
    all.Update(name.c_str(), static_cast<int64_t>(name.size()) + 1);
    all.Update(line.data(), static_cast<int64_t>(line.size()));
  }
  std::string text = "xxh3-128:";
  for (uint8_t byte : all.Finish()) {
    constexpr char kDigits[] = "0123456789abcdef";
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace pbs
