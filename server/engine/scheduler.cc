#include "server/engine/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pbs::server {
namespace {

// Of those that may run, all of one priority, in order of arrival.
const Candidate& Choose(std::span<const Candidate* const> equals) {
  const Candidate& first = *equals.front();
  const Candidate* chosen = &first;
  double patience = first.patience_seconds;  // of everyone before
  for (const Candidate* candidate : equals.subspan(1)) {
    if (candidate->seconds_left > 0 && candidate->seconds_left <= patience &&
        candidate->seconds_left < chosen->seconds_left) {
      chosen = candidate;
    }
    patience = std::min(patience, candidate->patience_seconds);
  }
  return *chosen;
}

}  // namespace

Decision Pick(std::span<const Candidate> candidates, absl::Time now) {
  Decision decision;
  std::vector<const Candidate*> most_important;
  for (const Candidate& candidate : candidates) {
    if (candidate.stopped || candidate.deadline <= now) {
      decision.ended.push_back(candidate.id);
      continue;
    }
    if (candidate.follows) continue;
    if (!most_important.empty()) {
      const int32_t priority = most_important.front()->priority;
      if (candidate.priority < priority) continue;
      if (candidate.priority > priority) most_important.clear();
    }
    most_important.push_back(&candidate);
  }
  if (!most_important.empty()) decision.next = Choose(most_important).id;
  return decision;
}

std::vector<size_t> PickCompanions(std::span<const Candidate> candidates, size_t next,
                                   std::span<const Companion> companions,
                                   int32_t tokens_left, int32_t places_left) {
  std::vector<size_t> picked;
  double patience = std::numeric_limits<double>::infinity();  // of whom they overtake
  double seconds = candidates[next].seconds_left;             // of all that run
  size_t seen = 0;
  for (const Companion& companion : companions) {
    for (; seen < companion.index; ++seen) {
      const Candidate& other = candidates[seen];
      const bool runs = seen == next || other.follows || other.stopped ||
                        std::find(picked.begin(), picked.end(), seen) != picked.end();
      if (runs || other.priority != candidates[next].priority) continue;
      patience = std::min(patience, other.patience_seconds);
    }
    const Candidate& candidate = candidates[companion.index];
    const bool fits_patience =
        std::isinf(patience) ||
        (candidate.seconds_left > 0 && seconds + candidate.seconds_left <= patience);
    if (places_left == 0 || companion.tokens > tokens_left || !fits_patience) continue;
    picked.push_back(companion.index);
    seconds += candidate.seconds_left;
    tokens_left -= companion.tokens;
    --places_left;
  }
  return picked;
}

}  // namespace pbs::server
