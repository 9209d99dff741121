#include "tests/gpu/check.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <utility>

#include "pbs/dtype.h"
#include "reference/reference_attention.h"
#include "tests/support/largest_error.h"
#include "tests/support/tolerances.h"

namespace pbs::gpu {
namespace {

// Rows of lists that are not the same.
int64_t OtherRows(const BlockLists& a, const BlockLists& b) {
  int64_t other = 0;
  for (int64_t row = 0; row < std::ssize(a.count); ++row) {
    other += std::ranges::equal(a.View().Row(row), b.View().Row(row)) ? 0 : 1;
  }
  return other;
}

void CompareRow(const Case& c, const Inputs& inputs, const Outputs& outputs,
                const reference::Output& exact, Place place, Verdict& verdict) {
  const bool bf16_values = inputs.dtype == DType::kBF16;
  const AttentionGeometry& g = inputs.geometry;
  const double allowed =
      testing_support::DeviceOutputTolerance(inputs.dtype, g.head_dim);
  const double lse_allowed = testing_support::DeviceLseTolerance(
      inputs.dtype, c.problem.options.mean_correction);
  const auto& s = g.sequences[static_cast<size_t>(place.sequence)];
  const auto row = static_cast<size_t>(place.head * g.total_q + s.q_begin + place.row);
  const auto dim = static_cast<size_t>(g.head_dim);
  const auto tile_row = static_cast<size_t>((s.query_offset + place.row) % 128);
  Mismatches& found = verdict.mismatches;
  for (size_t column = 0; column < dim; ++column) {
    const size_t i = row * dim + column;
    const uint16_t bits = outputs.o[i];
    const double got = bf16_values ? ToFloat(bf16{bits}) : ToFloat(f16{bits});
    const double error = std::abs(got - exact.o[i]);
    verdict.o_error = testing_support::LargerError(verdict.o_error, error);
    ++found.outputs;
    if (error <= allowed) continue;
    if (found.wrong++ == 0) {
      place.column = static_cast<int32_t>(column);
      found.first = place;
      found.got = got;
      found.want = exact.o[i];
    }
    ++found.by_half[tile_row / 64];
    ++found.by_row_mod_8[tile_row % 8];
    ++found.by_panel[column / 64];
  }
  const double lse_error = std::abs(outputs.lse[row] - exact.lse[row]);
  verdict.lse_error = testing_support::LargerError(verdict.lse_error, lse_error);
  found.wrong_lse += lse_error <= lse_allowed ? 0 : 1;
}

}  // namespace

StatusOr<Outputs> RunCase(Session& session, const Case& c, const Inputs& inputs) {
  AttentionBackend& attention = session.attention();
  PBS_ASSIGN_OR_RETURN(const auto plan, attention.Plan(c.problem));
  const AttentionGeometry& g = plan->geometry;
  const Inputs given = inputs.Poisoned(c.poisoned);
  const auto put = [&](const std::vector<uint16_t>& values) -> StatusOr<Buffer> {
    PBS_ASSIGN_OR_RETURN(Buffer buffer, Allocate(session, std::ssize(values) * 2));
    PBS_RETURN_IF_ERROR(
        session.copies().ToDevice(values.data(), buffer.data(), buffer.bytes()));
    return buffer;
  };
  PBS_ASSIGN_OR_RETURN(const Buffer q, put(given.q));
  PBS_ASSIGN_OR_RETURN(const Buffer k, put(given.k));
  PBS_ASSIGN_OR_RETURN(const Buffer v, put(given.v));
  PBS_ASSIGN_OR_RETURN(const Buffer o, Allocate(session, q.bytes()));
  Outputs outputs;
  outputs.lse.resize(static_cast<size_t>(g.num_heads * g.total_q));
  PBS_ASSIGN_OR_RETURN(const Buffer lse,
                       Allocate(session, std::ssize(outputs.lse) * 4));
  PBS_ASSIGN_OR_RETURN(const Buffer lent, Allocate(session, plan->workspace_bytes));
  PBS_RETURN_IF_ERROR(Poison(session, lent));
  AttentionTensors tensors =
      PackedTensors(g, q.data(), k.data(), v.data(), o.data(), lse.data());
  tensors.head_thresholds = given.head_thresholds;
  const auto run = [&] { return attention.Run(*plan, tensors, lent.workspace(), {}); };
  for (int i = 0; i < 3; ++i) {
    PBS_RETURN_IF_ERROR(Poison(session, o));
    PBS_RETURN_IF_ERROR(Poison(session, lse));
    PBS_RETURN_IF_ERROR(session.Wait());
    PBS_RETURN_IF_ERROR(i < 2 ? run() : RunCaptured(session.device(), run));
    PBS_RETURN_IF_ERROR(attention.ReadReport(
        *plan, lent.workspace(), {.order = true, .lists = true}, &outputs.report));
    if (!DescribeHang(session.device(), g.head_dim).empty()) {
      return Internal("a wait did not end");
    }
    std::vector<uint16_t> now(given.q.size());
    PBS_RETURN_IF_ERROR(session.copies().ToHost(o.data(), now.data(), o.bytes()));
    outputs.equal_bits = outputs.equal_bits && (i == 0 || now == outputs.o);
    outputs.o = std::move(now);
  }
  PBS_RETURN_IF_ERROR(
      session.copies().ToHost(lse.data(), outputs.lse.data(), lse.bytes()));
  return outputs;
}

std::string TellFailure(const Device& device, const Case& c, const Status& status) {
  const std::string hang = DescribeHang(device, c.problem.shape.head_dim);
  JsonLine line;
  line.Text("case", c.name).Integer("seed", c.seed).Bool("right", false);
  if (!hang.empty()) line.Text("hang", hang);
  const bool is_late = status.code() == StatusCode::kDeadlineExceeded;
  line.Bool("hung", is_late || !hang.empty()).Text("error", status.ToString());
  line.Print(stdout);
  line.Print(stderr);
  return hang;
}

std::jthread EndIfLate(const Device& device, const Case& c, int seconds) {
  return std::jthread([&device, &c, seconds](const std::stop_token& stop) {
    std::mutex mutex;
    std::condition_variable_any over;
    std::unique_lock lock(mutex);
    over.wait_for(lock, stop, std::chrono::seconds(seconds), [] { return false; });
    if (stop.stop_requested()) return;
    const std::string limit = std::to_string(seconds) + " s";
    TellFailure(device, c, {StatusCode::kDeadlineExceeded, "not over after " + limit});
    std::_Exit(2);
  });
}

Verdict Judge(const Case& c, const Inputs& inputs, const Outputs& outputs) {
  const AttentionTensors tensors = inputs.HostTensors();
  const reference::Decision decision = reference::DecisionOf(outputs.report);
  const reference::Output exact = reference::Attend(c.problem, tensors, decision);
  const AttentionGeometry& g = inputs.geometry;
  Verdict verdict;
  verdict.mismatches.by_half.resize(2);
  verdict.mismatches.by_row_mod_8.resize(8);
  verdict.mismatches.by_panel.resize(static_cast<size_t>((g.head_dim + 63) / 64));
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    if (n == c.poisoned) continue;
    const SequenceGeometry& s = g.sequences[static_cast<size_t>(n)];
    for (int32_t head = 0; head < g.num_heads; ++head) {
      for (int32_t row = 0; row < s.q_len; ++row) {
        CompareRow(c, inputs, outputs, exact, {n, head, row}, verdict);
      }
    }
  }
  verdict.rows = static_cast<int64_t>(decision.lists.count.size());
  if (!c.problem.options.dense_fallback) {
    verdict.other_rows =
        OtherRows(decision.lists, reference::Decide(c.problem, tensors).lists);
  }
  verdict.equal_bits = outputs.equal_bits;
  verdict.density = outputs.report.stats.Density();
  verdict.right =
      verdict.mismatches.wrong == 0 && verdict.mismatches.wrong_lse == 0 &&
      verdict.equal_bits &&
      verdict.other_rows <=
          std::max<int64_t>(1, verdict.rows / testing_support::kDeviceRowsPerOtherRow);
  return verdict;
}

JsonLine Mismatches::ToJson() const {
  JsonLine where;
  where.Integer("sequence", first.sequence).Integer("head", first.head);
  where.Integer("row", first.row).Integer("column", first.column);
  where.Text("got", std::to_string(got)).Number("want", want);
  JsonLine line;
  line.Integer("wrong", wrong).Integer("outputs", outputs);
  line.Integer("wrong_lse", wrong_lse);
  if (wrong > 0) line.Object("first", where);
  return line.Integers("by_half", by_half)
      .Integers("by_row_mod_8", by_row_mod_8)
      .Integers("by_panel", by_panel);
}

}  // namespace pbs::gpu
