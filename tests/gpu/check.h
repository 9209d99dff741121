// What check_attention is made of: problems and their inputs, a run on a device, and
// how what came out differs from the exact answer.
#pragma once

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "pbs/attention.h"
#include "tests/gpu/json_line.h"
#include "tests/gpu/session.h"

namespace pbs::gpu {

struct Case {
  std::string name;
  AttentionProblem problem;
  uint32_t seed = 1;
  // A sequence whose every value is NaN or infinite: nothing of it may reach another
  // one. -1: none.
  int32_t poisoned = -1;
};

// Methods, dtypes and shapes that a random problem may miss.
std::vector<Case> TableCases(uint32_t seed);
Case RandomCase(uint32_t seed);

// Packed q, k, v of a problem, 16-bit normal values.
struct Inputs {
  explicit Inputs(const Case& c);

  AttentionTensors HostTensors() const {
    return PackedTensors(geometry, q.data(), k.data(), v.data(), nullptr, nullptr);
  }
  // The same with Case::poisoned.
  Inputs Poisoned(int32_t sequence) const;

  DType dtype;
  AttentionGeometry geometry;
  std::vector<uint16_t> q, k, v;
};

struct Outputs {
  std::vector<uint16_t> o;
  std::vector<float> lse;
  bool equal_bits = true;  // of all runs
  AttentionReport report;
};

// Over a poisoned workspace and poisoned outputs: twice as it is, then as a graph.
// Internal behind the first run in which a wait did not end.
StatusOr<Outputs> RunCase(Session& session, const Case& c, const Inputs& inputs);

// Prints the line of a case that failed; gives where its kernel hangs, or "".
std::string TellFailure(const Device& device, const Case& c, const Status& status);

// Does so and ends the program with status 2, unless it is destroyed in time: a kernel
// that hangs never returns to the thread that waits for it.
std::jthread EndIfLate(const Device& device, const Case& c, int seconds);

struct Place {
  int32_t sequence = 0;
  int32_t head = 0;
  int32_t row = 0;
  int32_t column = 0;
};

// Outputs that are wrong, by where they are in their tile of 128 query rows: a half is
// a consumer's, eight rows are a period of the swizzle, 64 columns are a panel.
struct Mismatches {
  int64_t wrong = 0;
  int64_t outputs = 0;
  int64_t wrong_lse = 0;
  Place first;
  double got = 0, want = 0;  // there
  std::vector<int64_t> by_half, by_row_mod_8, by_panel;

  JsonLine ToJson() const;
};

struct Verdict {
  bool right = false;
  double o_error = 0;
  double lse_error = 0;
  int64_t rows = 0;        // of the lists
  int64_t other_rows = 0;  // that are not the reference's: a near tie may be
  bool equal_bits = true;
  double density = 0;
  Mismatches mismatches;
};

// With the exact answer over the order and the lists that ran; sequences that are
// poisoned are not looked at. `inputs`: without the poison.
Verdict Judge(const Case& c, const Inputs& inputs, const Outputs& outputs);

}  // namespace pbs::gpu
