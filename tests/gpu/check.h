// Parts of check_attention: problems and their inputs, a run on a device, and the
// comparison with the exact result.
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
  // A sequence whose values are all NaN or infinite. They must not reach another
  // sequence. -1: none.
  int32_t poisoned = -1;
  // Inputs of tests/support/attention_case.h, whose scores differ much between blocks;
  // else normal values.
  bool structured = false;
};

// What a random problem may miss: every method at every head dim and dtype, and the
// rows of tests/support/matrix_cases.h at every head dim.
std::vector<Case> TableCases(uint32_t seed);
Case RandomCase(uint32_t seed);

// Packed q, k, v of a problem, 16-bit values.
struct Inputs {
  explicit Inputs(const Case& c);

  AttentionTensors HostTensors() const {
    AttentionTensors tensors =
        PackedTensors(geometry, q.data(), k.data(), v.data(), nullptr, nullptr);
    tensors.head_thresholds = head_thresholds;
    return tensors;
  }
  // The same with Case::poisoned.
  Inputs Poisoned(int32_t sequence) const;

  DType dtype;
  AttentionGeometry geometry;
  std::vector<uint16_t> q, k, v;
  std::vector<float> head_thresholds;  // of structured problems that have them
};

struct Outputs {
  std::vector<uint16_t> o;
  std::vector<float> lse;
  bool equal_bits = true;  // of all runs
  AttentionReport report;
};

// Runs a case with poisoned workspace and outputs: twice directly, then as a graph.
// Internal after the first run in which a wait did not end.
StatusOr<Outputs> RunCase(Session& session, const Case& c, const Inputs& inputs);

// Prints the line of a case that failed. Returns the description of its kernel's hang,
// or "".
std::string TellFailure(const Device& device, const Case& c, const Status& status);

// Does so and ends the program with status 2, unless it is destroyed in time. It is
// needed because the wait for a kernel that hangs never returns.
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

// Compares with the exact result over the order and the lists that ran, without
// poisoned sequences. `inputs` are without the poison.
Verdict Judge(const Case& c, const Inputs& inputs, const Outputs& outputs);

}  // namespace pbs::gpu
