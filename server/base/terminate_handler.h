// What the process says when it ends for an exception that nobody catches.
//
// Our code throws nothing; the libraries do when the system refuses them a thread or
// memory. That is the machine's state and no bug: one line of the log says so, with
// what to do, and the exit status is kExitOutOfResources. Any other exception is named
// and aborts, so that a core file shows where it came from.
//
// Threading: call once, before other threads start; holds for all threads.
#pragma once

namespace pbs::server {

inline constexpr int kExitOutOfResources = 1;

void SayLastWords();

}  // namespace pbs::server
