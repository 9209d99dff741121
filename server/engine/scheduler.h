// The choice of the next job: a pure function of the jobs and the time.
//
// Threading: stateless. Memory: the result's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/time/time.h"
#include "server/engine/job_terms.h"

namespace pbs::server {

// A job that waits, or that is between two of its steps.
struct Candidate {
  JobId id = 0;
  int32_t priority = 0;
  absl::Time deadline = absl::InfiniteFuture();
  bool stopped = false;  // it was asked to end
  // Predicted time until it is done; 0: unknown.
  double seconds_left = 0;
  // Time by which later jobs of its priority may still delay it.
  double patience_seconds = 0;
  // It runs in the batch of an earlier job and is never next itself
  bool follows = false;
};

struct Decision {
  std::vector<JobId> ended;  // stopped, or past their deadline; in order of arrival
  // The job that runs its next step; none when no job is left
  std::optional<JobId> next;
};

// `candidates` are in order of arrival. The job of the highest priority runs. Among
// equal priorities the earliest arrival runs, so that a started job continues until one
// of higher priority comes. It yields to shorter jobs: to the shortest one that fits
// into the patience of every job that arrived before it. When the caller subtracts a
// job's delays from its patience, no job is delayed by more than its patience and one
// step. A job that a batch overtakes is charged the batch's whole step.
Decision Pick(std::span<const Candidate> candidates, absl::Time now);

// A waiting job that could join the batch of the next job.
struct Companion {
  size_t index = 0;    // index among the candidates
  int32_t tokens = 0;  // tokens that it adds
};

// Chooses the `companions`, in order of arrival, that run with `candidates[next]`: as
// many as `tokens_left` and `places_left` allow, of which all together fit into the
// patience of every job that they overtake.
std::vector<size_t> PickCompanions(std::span<const Candidate> candidates, size_t next,
                                   std::span<const Companion> companions,
                                   int32_t tokens_left, int32_t places_left);

}  // namespace pbs::server
