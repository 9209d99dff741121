#include <cstdint>
#include "pbs/attention.h"

namespace pbs {
namespace {

double Share(int64_t part, int64_t whole) {
  return whole == 0 ? 1.0 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

double AttentionStats::Density() const { return Share(executed_blocks, dense_blocks); }

double AttentionStats::LowerDensity() const {
  return Share(lower_blocks, causal_blocks);
}

double AttentionStats::CausalRatio() const {
  return Share(executed_blocks, causal_blocks);
}

}  // namespace pbs
