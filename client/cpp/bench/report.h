// The result as one JSON document, and as a table for people.
//
// Threading: pure functions, but that Report() asks the system what machine this is.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "client/cpp/bench/options.h"
#include "client/cpp/bench/session.h"

namespace pbs::bench {

// A gigabyte is 1e9 bytes. Rates and ratios are {median, min, max} over the rounds; a
// ratio is of a round's own rates. CPU seconds are those of both processes.
nlohmann::ordered_json Report(const BenchOptions& options, const std::string& command,
                              const SessionResult& result);

// Of a Report().
std::string Table(const nlohmann::ordered_json& report);

}  // namespace pbs::bench
