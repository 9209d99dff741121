#include "server/engine/scheduler.h"

#include <algorithm>

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

}  // namespace pbs::server
