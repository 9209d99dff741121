// Finds NaN and infinity in uploaded tensors.
//
// Threading: stateless. Memory: none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "pbs/dtype.h"

namespace pbs::server {

// Index of the first element that is NaN or infinite. Bytes after the last whole
// element are ignored. `bytes` must be aligned to the element.
std::optional<int64_t> FirstNonFinite(std::span<const std::byte> bytes, DType dtype);

}  // namespace pbs::server
