// Block lists of a given density, for density replay: what attention would cost at a
// density that the data at hand does not have.
#pragma once

#include <cstdint>

#include "pbs/attention.h"

namespace pbs::bench {

// Lists of method pbs: the own segment whole, the first block, and past blocks drawn
// without replacement by a fixed seed, so that all rows together reach `density`
// (executed over causal blocks) as nearly as rows allow.
BlockLists ForcedLists(const AttentionGeometry& geometry, double density);

}  // namespace pbs::bench
