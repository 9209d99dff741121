#include "server/engine/threshold_ladder.h"

namespace pbs::server {

float RungOf(float threshold) {
  float lowest = kThresholdLadder.front();
  for (const float rung : kThresholdLadder) {
    if (rung < threshold) break;
    lowest = rung;
  }
  return lowest;
}

float HighestThatFits(float asked, float lowest, absl::FunctionRef<bool(float)> fits) {
  if (fits(asked)) return asked;
  for (const float rung : kThresholdLadder) {
    if (rung >= asked) continue;
    if (rung < lowest) break;
    if (fits(rung)) return rung;
  }
  return lowest;
}

}  // namespace pbs::server
