// Memory that a caller lends to one run, and the layout of its regions.
//
// Threading: values. Memory: none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace pbs {

// Alignment in bytes of workspaces, of their regions and of all memory that backends
// allocate.
inline constexpr int64_t kMemoryAlignment = 256;

constexpr int64_t AlignedBytes(int64_t bytes) {
  return (bytes + kMemoryAlignment - 1) / kMemoryAlignment * kMemoryAlignment;
}

// Memory that the caller owns and lends to one Run().
struct Workspace {
  void* data = nullptr;
  int64_t bytes = 0;
};

// Hands out the regions of a workspace one after the other, as offsets in bytes.
class WorkspaceLayout {
 public:
  template <class T>
  int64_t Add(int64_t count) {
    return AddBytes(count * static_cast<int64_t>(sizeof(T)));
  }
  int64_t AddBytes(int64_t bytes) {
    const int64_t begin = bytes_;
    bytes_ += AlignedBytes(bytes);
    return begin;
  }
  // Bytes that were added since the last call, or since the start.
  int64_t TakePart() { return bytes_ - std::exchange(part_begin_, bytes_); }

  // For regions that take turns with those of a copy of this layout: as many bytes as
  // the larger of the two.
  void Cover(const WorkspaceLayout& other) { bytes_ = std::max(bytes_, other.bytes_); }

  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
  int64_t part_begin_ = 0;
};

}  // namespace pbs
