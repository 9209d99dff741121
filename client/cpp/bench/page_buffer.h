// Memory that transfers read from and write into: mapped, on huge pages where the
// system has them, and resident, so that no transfer pays for the first touch.
//
// Threading: a value; as safe as std::unique_ptr.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "absl/status/statusor.h"

namespace pbs::bench {

class PageBuffer {
 public:
  PageBuffer() = default;
  PageBuffer(PageBuffer&& other) noexcept { *this = std::move(other); }
  PageBuffer& operator=(PageBuffer&& other) noexcept;
  ~PageBuffer();

  // ResourceExhausted when the system has no memory to give.
  static absl::StatusOr<PageBuffer> Allocate(int64_t bytes);

  std::span<std::byte> span() const { return bytes_; }

 private:
  explicit PageBuffer(std::span<std::byte> bytes) : bytes_(bytes) {}

  std::span<std::byte> bytes_;
};

}  // namespace pbs::bench
