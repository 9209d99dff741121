// Block masks: the expanded form of block lists, for reading and for parity files.
//
// A mask is uint8 [num_heads, num_query_blocks, num_key_blocks] per sequence, sequences
// back to back; a byte is 1 when the query block reads the key block. For a batch of
// equal lengths without offset that is [batch, num_heads, n, n].
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "pbs/attention.h"

namespace pbs {

// Bytes of the masks of all sequences.
int64_t MaskBytes(const AttentionGeometry& geometry);

// Lists -> mask. Requires lists that fit `geometry`.
std::vector<uint8_t> ExpandMask(const AttentionGeometry& geometry,
                                const BlockListsView& lists);

// Mask -> compact lists, `num_masked` set. InvalidArgument when the size is not
// MaskBytes() or a byte is neither 0 nor 1. ValidateLists() checks whether the blocks
// may be read.
StatusOr<BlockLists> ListsFromMask(const AttentionGeometry& geometry,
                                   std::span<const uint8_t> mask);

// Compact lists of dense attention: every block up to the query block's own.
BlockLists CausalLists(const AttentionGeometry& geometry);

}  // namespace pbs
