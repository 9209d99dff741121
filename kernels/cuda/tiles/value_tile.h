// Products of a warp's probabilities with a tile of values, by mma.sync.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/tiles/shared_rows.h"

namespace pbs::cuda {

// out += p v, sixteen keys at a time. Fragments as in online_softmax.h, one per 16
// rows; probabilities are rounded to the type of the values.
template <class Element, int kRowTiles, int kKeys, int kHeadDim>
PBS_DEVICE void MultiplyValues(const float (&p)[kRowTiles][kKeys / 2],
                               const SharedRows<kKeys, kHeadDim>& v, int lane,
                               float (&out)[kRowTiles][kHeadDim / 2]) {
  using Values = SharedRows<kKeys, kHeadDim>;
  const uint32_t v_at = v.Address(lane % 16, lane / 16);
  PBS_UNROLL
  for (int key = 0; key < kKeys; key += 16) {
    uint32_t a[kRowTiles][4];
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      PBS_UNROLL
      for (int i = 0; i < 4; ++i) {
        a[t][i] = Element::Pack(p[t][key / 2 + 2 * i], p[t][key / 2 + 2 * i + 1]);
      }
    }
    PBS_UNROLL
    for (int piece = 0; piece < kHeadDim / 8; piece += 2) {
      uint32_t b[4];
      LoadMatricesTransposed(b, Values::Moved(v_at, key, piece));
      PBS_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        MultiplyFragments<Element>(&out[t][piece * 4], a[t], b[0], b[1]);
        MultiplyFragments<Element>(&out[t][piece * 4 + 4], a[t], b[2], b[3]);
      }
    }
  }
}

}  // namespace pbs::cuda
