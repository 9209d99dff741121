#include "server/engine/scheduler.h"

namespace pbs::server {

Decision Pick(std::span<const Candidate> candidates, absl::Time now) {
  Decision decision;
  const Candidate* best = nullptr;
  for (const Candidate& candidate : candidates) {
    if (candidate.stopped || candidate.deadline <= now) {
      decision.ended.push_back(candidate.id);
    } else if (best == nullptr || candidate.priority > best->priority) {
      best = &candidate;
    }
  }
  if (best != nullptr) decision.next = best->id;
  return decision;
}

}  // namespace pbs::server
