// What the attention kernels do with the rows of a fragment (tiles/online_softmax.h).
#pragma once

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"
#include "cuda/tiles/online_softmax.h"

namespace pbs::cuda {

// Block at `step` of a tile's list, from its end.
PBS_DEVICE int ListBlock(const AttentionParams& params, const AttentionTile& tile,
                         int step) {
  const int entry = tile.list_count - 1 - step;
  if (tile.list_begin < 0) return entry;
  return LoadGlobal(params.lists + tile.list_begin + entry);
}

// Positions of the keys of a fragment's columns, which begin at `slot` of the sequence.
template <int kPairs>
PBS_DEVICE void LoadPositions(const AttentionParams& params, int order_head,
                              int first_slot, int slot, int lane,
                              Int2 (&keys)[kPairs]) {
  const int column = slot + lane % 4 * 2;
  if (params.positions == nullptr) {
    PBS_UNROLL
    for (int i = 0; i < kPairs; ++i) keys[i] = {column + i * 8, column + i * 8 + 1};
    return;
  }
  const auto* at = reinterpret_cast<const Int2*>(
      params.positions + order_head * params.position_stride + first_slot + column);
  PBS_UNROLL
  for (int i = 0; i < kPairs; ++i) keys[i] = LoadGlobal(at + i * 4);
}

// Keys behind a row's own position, and padding, have no score.
template <int kPairs>
PBS_DEVICE void MaskRows(const Int2 (&keys)[kPairs], int position,
                         float (&scores)[4 * kPairs]) {
  PBS_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const Int2 key = keys[i];
    if (key.x > position) scores[i * 4] = -kInfinity;
    if (key.y > position) scores[i * 4 + 1] = -kInfinity;
    if (key.x > position + 8) scores[i * 4 + 2] = -kInfinity;
    if (key.y > position + 8) scores[i * 4 + 3] = -kInfinity;
  }
}

// Four lanes' words change places: lane l of the four has had the l-th word of each
// group and gets the l-th group.
PBS_DEVICE Words4 TransposeOfQuad(Words4 groups, int lane) {
  uint32_t(&words)[4] = groups.words;
  PBS_UNROLL
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & distance) != 0;
    PBS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int first = i * (2 / distance);
      uint32_t& low = words[first];
      uint32_t& high = words[first + distance];
      const uint32_t came = ShuffleXor(upper ? low : high, distance);
      (upper ? low : high) = came;
    }
  }
  return groups;
}

// Divides by the sums and writes the rows that are the sequence's, and their LSE.
template <class Element, int kSums>
PBS_DEVICE void StoreRows(const AttentionParams& params, const AttentionTile& tile,
                          int first_row, int lane, const OnlineSoftmax& softmax,
                          const float (&out)[kSums]) {
  PBS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float sum = softmax.RowSum(r);
    const float inverse = sum > 0 ? 1.0f / sum : 0.0f;  // no key seen: 0
    const int row = first_row + 8 * r;
    const bool stored = row >= tile.begin_row && row < tile.end_row;
    int target = tile.first_query + row;
    if (stored && params.row_map != nullptr) {
      target = LoadGlobal(params.row_map + tile.q_begin + target);
    }
    auto* o = static_cast<uint16_t*>(params.o) +
              params.o_strides.Offset(tile.sequence, tile.q_begin, tile.head, target);
    PBS_UNROLL
    for (int i = 0; i < kSums / 4; i += 4) {
      Words4 groups;
      PBS_UNROLL
      for (int j = 0; j < 4; ++j) {
        groups.words[j] = Element::Pack(out[(i + j) * 4 + 2 * r] * inverse,
                                        out[(i + j) * 4 + 2 * r + 1] * inverse);
      }
      groups = TransposeOfQuad(groups, lane);
      if (stored) {
        StoreGlobal(reinterpret_cast<Words4*>(o + (i + lane % 4) * 8), groups);
      }
    }
    if (stored && params.lse != nullptr && lane % 4 == 0) {
      StoreGlobal(params.lse + params.lse_strides.Offset(tile.sequence, tile.q_begin,
                                                         tile.head, target),
                  (softmax.max[r] * params.scale_log2 + Log2(sum)) * kLn2);
    }
  }
}

}  // namespace pbs::cuda
