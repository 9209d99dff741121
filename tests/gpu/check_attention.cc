// Compares the CUDA backend's attention with kernels/reference on a device: a table of
// methods, dtypes and shapes, then random problems.
//
//   check_attention [--random N] [--seed S] [--variant NAME] [--only SUBSTRING ...]
//                   [--skip N] [--case-seconds N] [--device 1]
//
// --variant: other kernels than the chosen ones (attention_variants.h). --only: cases
// whose name has one of the substrings. --skip: not the first N of them.
// --case-seconds: a case that is longer on the device ends the program (SIGALRM).
// --device: says what the device is, and nothing else.
//
// Two JSON lines per problem. Its name before it runs: a fault or a hang is of the last
// one. Then errors of o and lse against the exact answer over the same order and lists,
// rows whose lists differ from the reference's (a near tie may), and whether a second
// run and a replay of a captured graph gave the same bits; where that is wrong, what is
// wrong, on stderr to be read. Exit status 1 when any is out of bounds, 2 when the
// device is not there or can be used no more.
//
// check_attention_bounded says, too, which wait of a kernel did not end.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "tests/gpu/check.h"

namespace pbs::gpu {
namespace {

struct Options {
  int random_problems = 40;
  int seed = 1;
  int skip = 0;
  int case_seconds = 0;  // 0: no limit
  int names_device = 0;
  std::vector<std::string> only;
  cuda::AttentionVariant variant = cuda::AttentionVariant::kChosen;
};

// False when the argument is not known.
bool ParseOption(const std::string& name, const char* value, Options& options) {
  const std::pair<const char*, int Options::*> numbers[] = {
      {"--random", &Options::random_problems},
      {"--seed", &Options::seed},
      {"--skip", &Options::skip},
      {"--case-seconds", &Options::case_seconds},
      {"--device", &Options::names_device}};
  for (const auto& [option, field] : numbers) {
    if (name != option) continue;
    options.*field = std::atoi(value);
    return true;
  }
  if (name == "--only") options.only.emplace_back(value);
  if (name == "--only") return true;
  const auto& names = cuda::kAttentionVariantNames;
  const auto found = std::find(names.begin(), names.end(), std::string(value));
  options.variant = static_cast<cuda::AttentionVariant>(found - names.begin());
  return name == "--variant" && found != names.end();
}

std::vector<Case> CasesOf(const Options& options) {
  const auto seed = static_cast<uint32_t>(options.seed);
  std::vector<Case> cases = TableCases(seed);
  for (int i = 0; i < options.random_problems; ++i) {
    cases.push_back(RandomCase(seed + static_cast<uint32_t>(i)));
  }
  std::erase_if(cases, [&](const Case& c) {
    const auto in_name = [&](const std::string& part) {
      return c.name.find(part) != std::string::npos;
    };
    return !options.only.empty() &&
           std::none_of(options.only.begin(), options.only.end(), in_name);
  });
  const auto skipped = std::min<std::ptrdiff_t>(options.skip, std::ssize(cases));
  cases.erase(cases.begin(), cases.begin() + skipped);
  return cases;
}

// Whether it is right. Ends the program where nothing runs any more.
bool Check(Session& session, const Case& c, int case_seconds) {
  JsonLine().Text("begin", c.name).Integer("seed", c.seed).Print();
  const Inputs inputs(c);
  alarm(static_cast<unsigned>(case_seconds));
  const auto outputs = RunCase(session, c, inputs);
  alarm(0);
  JsonLine line;
  line.Text("case", c.name).Integer("seed", c.seed);
  const std::string hang = DescribeHang(c.problem.shape.head_dim);
  if (!hang.empty()) line.Text("hang", hang);
  if (!outputs.ok()) {
    line.Bool("right", false).Text("error", outputs.status().ToString());
    line.Print();
    line.Show();
    if (!session.driver().Health().ok()) std::_Exit(2);
    return false;
  }
  const Verdict verdict = Judge(c, inputs, *outputs);
  line.Bool("right", verdict.right).Number("o_error", verdict.o_error);
  line.Number("lse_error", verdict.lse_error).Integer("rows", verdict.rows);
  line.Integer("other_rows", verdict.other_rows);
  line.Bool("equal_bits", verdict.equal_bits).Number("density", verdict.density);
  if (!verdict.right) {
    line.Object("diagnosis", verdict.mismatches.ToJson());
    line.Show();
  }
  line.Print();
  return verdict.right;
}

int Run(const Options& options) {
  const auto session = Session::Open(options.variant);
  if (!session.ok()) {
    std::fprintf(stderr, "%s\n", session.status().ToString().c_str());
    return 2;
  }
  const cuda::DeviceInfo& info = (*session)->driver().info();
  JsonLine().Text("device", info.name).Text("architecture", info.architecture).Print();
  if (options.names_device != 0) return 0;
  static_cast<void>(DescribeHang(0));
  int wrong = 0;
  for (const Case& c : CasesOf(options)) {
    wrong += Check(**session, c, options.case_seconds) ? 0 : 1;
  }
  JsonLine().Integer("wrong", wrong).Print();
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace pbs::gpu

int main(int argc, char** argv) {
  pbs::gpu::Options options;
  for (int i = 1; i < argc; i += 2) {
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (pbs::gpu::ParseOption(argv[i], value, options)) continue;
    std::fprintf(stderr, "%s %s is not known; see the first lines of %s\n", argv[i],
                 value, "tests/gpu/check_attention.cc");
    return 2;
  }
  return pbs::gpu::Run(options);
}
