// The terminate handler: logs one line about an exception that nobody catches.
//
// Our code throws nothing. Libraries throw when the system refuses them a thread or
// memory. This is no bug: the handler logs it, with what to do, and exits with
// kExitOutOfResources. It logs the message of any other exception and aborts, so that a
// core file shows the origin.
//
// Threading: call once, before other threads start; it applies to all threads.
#pragma once

namespace pbs::server {

inline constexpr int kExitOutOfResources = 1;

void InstallTerminateHandler();

}  // namespace pbs::server
