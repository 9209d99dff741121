#include "server/codec/chunk_assembler.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/strings/str_cat.h"
#include "pbs/check.h"

namespace pbs::server {

std::string TensorLabel(v1::TensorName tensor) {
  if (v1::TensorName_IsValid(tensor)) return v1::TensorName_Name(tensor);
  return absl::StrCat("TensorName ", static_cast<int>(tensor));
}

void ChunkAssembler::Expect(v1::TensorName tensor, std::span<std::byte> target) {
  PBS_CHECK(Find(tensor) == nullptr);
  parts_.push_back({tensor, target});
}

absl::Status ChunkAssembler::Add(const wire::TensorChunk& chunk) {
  auto* part = const_cast<Part*>(Find(chunk.tensor));
  const std::string label = TensorLabel(chunk.tensor);
  if (part == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "chunk of tensor ", label, ", which the header does not announce"));
  }
  const uint64_t size = part->target.size();
  const auto refuse = [&](const char* what) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", label, ": chunk of ", chunk.data.size(),
                     " bytes at offset ", chunk.offset, " ", what, "; expected offset ",
                     part->received, " of ", size, " bytes"));
  };
  if (chunk.offset > part->received) return refuse("leaves a gap");
  if (chunk.offset < part->received) return refuse("repeats bytes");
  if (chunk.data.size() > size - part->received) return refuse("ends past the tensor");
  if (chunk.data.size() == 0 && size > 0) return refuse("is empty");
  chunk.data.CopyTo(part->target.data() + part->received);
  part->received += chunk.data.size();
  return absl::OkStatus();
}

absl::Status ChunkAssembler::Finish() const {
  for (const Part& part : parts_) {
    if (part.received == part.target.size()) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", TensorLabel(part.tensor), ": the upload ended at offset ",
        part.received, " of ", part.target.size(), " bytes"));
  }
  return absl::OkStatus();
}

std::span<const std::byte> ChunkAssembler::Received(v1::TensorName tensor) const {
  const Part* part = Find(tensor);
  PBS_CHECK(part != nullptr);
  return part->target.first(part->received);
}

const ChunkAssembler::Part* ChunkAssembler::Find(v1::TensorName tensor) const {
  for (const Part& part : parts_) {
    if (part.tensor == tensor) return &part;
  }
  return nullptr;
}

}  // namespace pbs::server
