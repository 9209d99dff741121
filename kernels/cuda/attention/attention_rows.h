// Steps of the attention kernels on the rows of a fragment (tiles/online_softmax.h).
#pragma once

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"
#include "cuda/tiles/block_part.h"
#include "cuda/tiles/online_softmax.h"

namespace pbs::cuda {

// Block at index `entry` of the list that begins at `list`. A negative `list` is the
// list of every block.
PBS_DEVICE int ListEntry(const AttentionParams& params, int64_t list, int entry) {
  return list < 0 ? entry : LoadGlobal(params.lists + list + entry);
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
  const int32_t* at =
      params.positions + order_head * params.position_stride + first_slot + column;
  PBS_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    keys[i] = LoadGlobal(reinterpret_cast<const Int2*>(at + i * 8));
  }
}

// Where tiles read parts of blocks: the part of a block that a group of rows reads, and
// the chosen columns among 32 of its keys.
struct PartOfBlock {
  uint32_t part;
  uint32_t columns;

  // Bit i: the group reads key 32 `word` + i, `word` being that of the columns.
  PBS_DEVICE uint32_t Bits(int word) const {
    return PartWord(part, word) & ~((part & kColumnsApart) != 0 ? columns : 0);
  }
};

// `block` of the tile's sequence is at `entry` of AttentionParams::lists.
PBS_DEVICE PartOfBlock LoadPart(const AttentionParams& params, int64_t entry, int group,
                                int head, int first_slot, int block, int word) {
  const int at = (first_slot / kBlockKeys + block) * (kBlockKeys / 32) + word;
  const bool gathered = at >= params.column_stride;
  return {
      LoadGlobal(params.parts + entry * kGroupsOfTile + group),
      gathered ? 0 : LoadGlobal(params.column_bits + head * params.column_stride + at)};
}

// Keys of a fragment's columns that the group does not read become keys after every
// row. Bit i of word w is that of column 32 w + i.
template <int kWords>
PBS_DEVICE void HideUnread(const uint32_t (&bits)[kWords], int lane,
                           Int2 (&keys)[4 * kWords]) {
  PBS_UNROLL
  for (int i = 0; i < 4 * kWords; ++i) {
    const uint32_t pair = bits[i / 4] >> lane % 4 * 2 >> i % 4 * 8;
    if ((pair & 1) == 0) keys[i].x = INT32_MAX;
    if ((pair & 2) == 0) keys[i].y = INT32_MAX;
  }
}

// Sets the scores of keys after a row's own position, and of padding, to -inf.
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

// As MaskRows(), for keys in their original order: a row sees the keys up to `last`,
// counted from the thread's first column.
template <int kScores>
PBS_DEVICE void MaskBehind(int last, float (&scores)[kScores]) {
  PBS_UNROLL
  for (int i = 0; i < kScores / 4; ++i) {
    if (i * 8 > last) scores[i * 4] = -kInfinity;
    if (i * 8 + 1 > last) scores[i * 4 + 1] = -kInfinity;
    if (i * 8 > last + 8) scores[i * 4 + 2] = -kInfinity;
    if (i * 8 + 1 > last + 8) scores[i * 4 + 3] = -kInfinity;
  }
}

// Exchanges words of four lanes: lane l of the four holds the l-th word of each group
// and receives the l-th group.
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

// Inverse of a row's sum. It is 0 for a row that saw no key, whose outputs are 0.
PBS_DEVICE float Inverse(float sum) { return sum > 0 ? 1.0f / sum : 0.0f; }

PBS_DEVICE bool IsStored(const AttentionTile& tile, int row) {
  return row >= tile.begin_row && row < tile.end_row;
}

// Divides by the sums and writes the rows of the tile that belong to the sequence.
template <class Element, int kSums>
PBS_DEVICE void StoreRows(const AttentionParams& params, const AttentionTile& tile,
                          int first_row, int lane, const OnlineSoftmax& softmax,
                          const float (&out)[kSums]) {
  PBS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float inverse = Inverse(softmax.RowSum(r));
    const int row = first_row + 8 * r;
    const bool stored = IsStored(tile, row);
    auto* o = static_cast<uint16_t*>(params.o) +
              params.o_strides.Offset(tile.sequence, tile.q_begin, tile.head,
                                      tile.first_query + row);
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
  }
}

// Writes the LSE of the rows that belong to the sequence, if it is requested.
PBS_DEVICE void StoreLse(const AttentionParams& params, const AttentionTile& tile,
                         int first_row, int lane, const OnlineSoftmax& softmax) {
  PBS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float sum = softmax.RowSum(r);
    const int row = first_row + 8 * r;
    if (params.lse == nullptr || lane % 4 != 0 || !IsStored(tile, row)) continue;
    StoreGlobal(
        params.lse + params.lse_strides.Offset(tile.sequence, tile.q_begin, tile.head,
                                               tile.first_query + row),
        (softmax.max[r] * params.scale_log2 + Log2(sum)) * kLn2);
  }
}

}  // namespace pbs::cuda
