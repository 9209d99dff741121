// Compares the CUDA backend's attention with kernels/reference on a device: a table of
// methods, dtypes and shapes, then random problems.
//
//   check_attention [--random N] [--seed S] [--variant NAME] [--only SUBSTRING ...]
//                   [--skip N] [--case-seconds N] [--device 1]
//
// --variant: other kernels than the chosen ones (attention_variants.h). --only: cases
// whose name has one of the substrings. --skip: not the first N of them.
// --case-seconds: a case that is longer on the device ends the program.
// --device: says what the device is, and nothing else.
//
// Two JSON lines per problem: its name before it runs, as a fault or a hang is of the
// last one, and what came out, also on stderr where that is wrong. Exit status 1 when
// any is out of bounds, 2 when the device is not there or can be used no more: after a
// fault, or a case that hung (of which check_attention_bounded says where).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "tests/gpu/check.h"

namespace pbs::gpu {
namespace {

// By name; --only may come more than once.
using Options = std::multimap<std::string, std::string>;
constexpr const char* kNames[] = {"--random", "--seed", "--skip",   "--case-seconds",
                                  "--device", "--only", "--variant"};

int Number(const Options& options, const char* name, int otherwise) {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : std::atoi(found->second.c_str());
}

std::vector<Case> CasesOf(const Options& options) {
  const auto seed = static_cast<uint32_t>(Number(options, "--seed", 1));
  std::vector<Case> cases = TableCases(seed);
  for (int i = 0; i < Number(options, "--random", 40); ++i) {
    cases.push_back(RandomCase(seed + static_cast<uint32_t>(i)));
  }
  const auto [begin, end] = options.equal_range("--only");
  std::erase_if(cases, [&, first = begin, last = end](const Case& c) {
    return first != last && std::none_of(first, last, [&](const auto& only) {
             return c.name.find(only.second) != std::string::npos;
           });
  });
  const auto skipped =
      std::min<std::ptrdiff_t>(Number(options, "--skip", 0), std::ssize(cases));
  cases.erase(cases.begin(), cases.begin() + skipped);
  return cases;
}

// Whether it is right. Ends the program where nothing runs any more.
bool Check(Session& session, const Case& c, int case_seconds) {
  JsonLine().Text("begin", c.name).Integer("seed", c.seed).Print();
  const Inputs inputs(c);
  std::optional<std::jthread> watchdog;
  if (case_seconds > 0) watchdog = EndIfLate(session.device(), c, case_seconds);
  const auto outputs = RunCase(session, c, inputs);
  watchdog.reset();
  if (!outputs.ok()) {
    const std::string hang = TellFailure(session.device(), c, outputs.status());
    if (!hang.empty() || !session.driver().Health().ok()) std::_Exit(2);
    return false;
  }
  JsonLine line;
  line.Text("case", c.name).Integer("seed", c.seed);
  const Verdict verdict = Judge(c, inputs, *outputs);
  line.Bool("right", verdict.right).Number("o_error", verdict.o_error);
  line.Number("lse_error", verdict.lse_error).Integer("rows", verdict.rows);
  line.Integer("other_rows", verdict.other_rows);
  line.Bool("equal_bits", verdict.equal_bits).Number("density", verdict.density);
  if (!verdict.right) {
    line.Object("diagnosis", verdict.mismatches.ToJson()).Print(stderr);
  }
  line.Print();
  return verdict.right;
}

int Run(const Options& options) {
  const auto& names = cuda::kAttentionVariantNames;
  const auto asked = options.find("--variant");
  const std::string variant = asked == options.end() ? names[0] : asked->second;
  const auto found = std::find(names.begin(), names.end(), variant);
  const auto is_known = [](const auto& option) {
    return std::find(std::begin(kNames), std::end(kNames), option.first) !=
           std::end(kNames);
  };
  if (found == names.end() || !std::all_of(options.begin(), options.end(), is_known)) {
    std::fprintf(stderr, "see the first lines of tests/gpu/check_attention.cc\n");
    return 2;
  }
  const auto session =
      Session::Open(static_cast<cuda::AttentionVariant>(found - names.begin()));
  if (!session.ok()) {
    std::fprintf(stderr, "%s\n", session.status().ToString().c_str());
    return 2;
  }
  const cuda::DeviceInfo& info = (*session)->driver().info();
  JsonLine().Text("device", info.name).Text("architecture", info.architecture).Print();
  if (options.contains("--device")) return 0;
  int wrong = 0;
  for (const Case& c : CasesOf(options)) {
    wrong += Check(**session, c, Number(options, "--case-seconds", 0)) ? 0 : 1;
  }
  JsonLine().Integer("wrong", wrong).Print();
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace pbs::gpu

int main(int argc, char** argv) {
  pbs::gpu::Options options;
  for (int i = 1; i < argc; i += 2) {
    options.emplace(argv[i], i + 1 < argc ? argv[i + 1] : "");
  }
  return pbs::gpu::Run(options);
}
