// The result as one JSON document, and as a table to read.
//
// Threading: Table() is pure; Report() also asks the system for the machine's facts.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "client/cpp/bench/options.h"
#include "client/cpp/bench/session.h"

namespace pbs::bench {

// A gigabyte is 1e9 bytes. Rates and ratios are {median, min, max} over the rounds;
// each ratio is of two rates of one round. CPU seconds are the sum of both processes.
nlohmann::ordered_json Report(const BenchOptions& options, const std::string& command,
                              const SessionResult& result);

// The table of a Report().
std::string Table(const nlohmann::ordered_json& report);

}  // namespace pbs::bench
