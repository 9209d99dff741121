// A cache of tensor maps. The driver takes microseconds to create one, and a model's
// layers use the same few repeatedly.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>

#include "cuda/plan/mapped_operand.h"

namespace pbs::cuda {

// Threading: one caller at a time.
class TensorMaps {
 public:
  // False when the driver refuses the operand, or has no such function.
  bool Get(const MappedOperand& mapped, CUtensorMap* map);

 private:
  struct Entry {
    MappedOperand mapped;
    CUtensorMap map;
  };
  // Enough for queries, outputs, and keys and values of two layers or permuted ones.
  static constexpr size_t kEntries = 16;

  using Encode = decltype(&cuTensorMapEncodeTiled);
  bool Make(const MappedOperand& mapped, CUtensorMap* map);

  Encode encode_ = nullptr;
  std::array<Entry, kEntries> entries_{};
  size_t num_entries_ = 0;
  size_t next_ = 0;  // the entry to replace when all are in use
};

}  // namespace pbs::cuda
