// The key order of one order head. Private to the reference.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/operands.h"

namespace pbs::reference {

// Original position of the key in each slot, [k_len]: the given order, the one sorted
// by importance, or the identity where keys are not sorted.
std::vector<int32_t> OrderOf(const AttentionProblem& problem, const Operands& in,
                             const AttentionGeometry& g, int32_t order_head);

}  // namespace pbs::reference
