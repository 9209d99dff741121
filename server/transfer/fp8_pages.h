// Pages of a cache as F8_E4M3 bytes with a scale: KvChunk.scales of kv.proto.
//
// A page is a run of elements that share a scale. The scale is the greatest finite
// magnitude of the page over 448, at least 2^-126, and 0 when every finite element is
// 0. A byte is the e4m3 number nearest to element / scale, ties to even. Zeros keep
// their sign. NaN stays NaN, and an infinity becomes NaN, because the format has none:
// a number that cannot be sent never arrives as another number.
//
// With x' = number(byte) * scale, |x - x'| <= max(|x| / 16, scale * 2^-10) for every
// finite x, up to the rounding of f32.
//
// Threading: pure functions.
#pragma once

#include <cstdint>

#include "pbs/dtype.h"

namespace pbs::server {

float PageScale(const void* elements, DType dtype, int64_t count);

// `scale` is PageScale() of a page that has these elements.
void EncodeFp8(const void* elements, DType dtype, int64_t count, float scale,
               uint8_t* target);

}  // namespace pbs::server
