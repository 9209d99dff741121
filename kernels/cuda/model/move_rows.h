// Copies rows from one matrix to another with conversion: embeddings of tokens, rows
// whose logits are requested, queries in another dtype.
#pragma once

#include <cstdint>

#include "cuda/model/quads.h"

namespace pbs::cuda {

struct MoveRowsParams {
  const void* source;
  void* target;
  const int32_t* row_index;  // row i comes from row_index[i]; null: from row i
  int32_t quads;             // quads of a row
  DType source_dtype;
  DType target_dtype;
};

// Grid [rows].
struct MoveRows {
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const MoveRowsParams& params) {
    const int row = BlockIndex();
    const int64_t from =
        params.row_index != nullptr ? LoadGlobal(params.row_index + row) : row;
    for (int quad = ThreadIndex(); quad < params.quads; quad += kThreads) {
      StoreQuad(
          params.target, params.target_dtype, int64_t{row} * params.quads + quad,
          LoadQuad(params.source, params.source_dtype, from * params.quads + quad));
    }
  }
};

}  // namespace pbs::cuda
