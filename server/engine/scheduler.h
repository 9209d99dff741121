// What runs next: a pure function of the jobs there are and the time.
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
  bool stopped = false;  // somebody has asked it to end
  // Predicted until it is done; 0: nothing is known.
  double seconds_left = 0;
  // For how long later ones of its priority may still delay it.
  double patience_seconds = 0;
  bool follows = false;  // it runs with an earlier one and is never next itself
};

struct Decision {
  std::vector<JobId> ended;   // stopped, or past their deadline; in order of arrival
  std::optional<JobId> next;  // runs its next step; none when nothing is left
};

// `candidates` in order of arrival. The highest priority runs. Among equals the
// earliest arrival does, so that a job that has begun goes on until a more important
// one comes; but it yields to the shortest of those that are shorter than itself and
// that fit into the patience of everyone who came before them. If what a job was
// delayed is taken off its patience, no job is delayed by more than its patience and
// the step that ended it. Whoever is overtaken by one of several jobs that run as one
// is charged the whole step.
Decision Pick(std::span<const Candidate> candidates, absl::Time now);

// A job that waits and could run with the one that is next.
struct Companion {
  size_t index = 0;    // among the candidates
  int32_t tokens = 0;  // that it brings
};

// Which of `companions`, in order of arrival, run with `candidates[next]`: as many as
// `tokens_left` and `places_left` allow, and only those that fit together into the
// patience of everyone whom they overtake.
std::vector<size_t> PickCompanions(std::span<const Candidate> candidates, size_t next,
                                   std::span<const Companion> companions,
                                   int32_t tokens_left, int32_t places_left);

}  // namespace pbs::server
