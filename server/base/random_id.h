// Unguessable identifiers from the kernel's random generator.
//
// Threading: safe from any thread.
#pragma once

#include <cstdint>
#include <string>

namespace pbs::server {

// 64 random bits, never 0.
uint64_t RandomU64();

// 128 random bits as 32 lower-case hex digits.
std::string RandomHandle();

}  // namespace pbs::server
