// The attention options of a case's words.
#pragma once

#include "pbs/attention.h"
#include "tests/bench/bench_case.h"

namespace pbs::bench {

// method=, scope=, segment=, threshold=, density= (forces lists).
AttentionOptions OptionsOf(const Words& words);

}  // namespace pbs::bench
