// Scores of a warp's query rows with a tile of keys, by mma.sync.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/tiles/shared_rows.h"

namespace pbs::cuda {

// scores += q k^T: 16 kRowTiles rows of q from `first_row` on, all rows of k. Fragments
// as in online_softmax.h, one per 16 rows.
template <class Element, int kRowTiles, int kQueries, int kKeys, int kHeadDim>
PBS_DEVICE void MultiplyKeys(const SharedRows<kQueries, kHeadDim>& q, int first_row,
                             const SharedRows<kKeys, kHeadDim>& k, int lane,
                             float (&scores)[kRowTiles][kKeys / 2]) {
  using Queries = SharedRows<kQueries, kHeadDim>;
  using Keys = SharedRows<kKeys, kHeadDim>;
  const uint32_t q_at = q.Address(first_row + lane % 16, lane / 16);
  const uint32_t k_at = k.Address(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  PBS_UNROLL
  for (int piece = 0; piece < kHeadDim / 8; piece += 2) {
    uint32_t a[kRowTiles][4];
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      LoadMatrices(a[t], Queries::Moved(q_at, t * 16, piece));
    }
    PBS_UNROLL
    for (int key = 0; key < kKeys; key += 16) {
      uint32_t b[4];
      LoadMatrices(b, Keys::Moved(k_at, key, piece));
      PBS_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        MultiplyFragments<Element>(&scores[t][key / 2], a[t], b[0], b[1]);
        MultiplyFragments<Element>(&scores[t][key / 2 + 4], a[t], b[2], b[3]);
      }
    }
  }
}

}  // namespace pbs::cuda
