// Chunks of F8_E4M3 on the consumer's side: their scales checked, their numbers
// widened.
//
// Threading: stateless functions. Memory: the caller's; a copy of a payload that came
// in pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "proto/wire/messages.h"

namespace pbs::wire {

// "" when `chunk`, whose tokens, heads and layout the caller has checked, has the scale
// of every page: finite, and not negative. Else what is wrong.
std::string CheckScales(const KvChunk& chunk, int32_t page_tokens);

// Writes number(byte) * scale of every byte, in `dtype`: F32, F16 or BF16, to nearest,
// ties to even. NaN stays NaN. The chunk has good scales, and
// token_count * head_count * head_dim bytes.
void WidenFp8(const KvChunk& chunk, int32_t page_tokens, int32_t head_dim,
              v1::DType dtype, std::byte* target);

}  // namespace pbs::wire
