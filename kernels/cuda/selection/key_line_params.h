// Parameters of the kernels that choose key columns and distances (minference;
// docs/KERNELS.md, "Columns and diagonals").
#pragma once

#include <cstdint>

#include "cuda/primitives/host_device.h"

namespace pbs::cuda {

constexpr int kKeyLineQueries = 64;  // last queries, whose attention chooses
constexpr int kForcedColumns = 30;
constexpr int kForcedDistances = 100;
constexpr int kColumnsMin = 30;
constexpr int kDistancesMin = 50;

// Of a sequence of `k_len` keys; wanted: by the options.
PBS_HOST_DEVICE constexpr int NumColumns(int wanted, int k_len) {
  const int count = wanted > kColumnsMin ? wanted : kColumnsMin;
  return count < k_len ? count : k_len;
}
PBS_HOST_DEVICE constexpr int NumDistances(int wanted, int k_len) {
  const int count = wanted > kDistancesMin ? wanted : kDistancesMin;
  return count < k_len ? count : k_len;
}

struct KeyLineParams {
  int32_t vertical_tokens;
  int32_t slash_tokens;
  int32_t total_gathered;  // blocks of gathered columns of all sequences, one head

  // Masses by distance, [num_heads, total_key_blocks, 128]; those by key slot are
  // LineParams::columns.
  float* distances;
  // Chosen columns, ascending: [num_heads, total_gathered, 128]. Bits of chosen columns
  // and distances: [num_heads, total_key_blocks, 4].
  int32_t* chosen;
  uint32_t* column_bits;
  uint32_t* distance_bits;
  // Parts of the blocks (tiles/block_part.h): [entries, 2]. Gathered blocks of a list,
  // which come before its first block: [rows]. The first block of which a group reads
  // no column apart: [rows, 2].
  uint32_t* parts;
  uint16_t* gathered;
  uint16_t* column_ends;
};

}  // namespace pbs::cuda
