// What the queue's two rules do to a mix of long and short prompts (docs/adr/0005:
// yield between layers; docs/adr/0015: short prompts share a run). The executor, the
// scheduler and the cost model are the server's; time is a ManualClock that a prompt's
// layers advance by what Rates say, and prompts arrive in the middle of a layer too.
//
// stdout: JSON, a row for every yield share, with and without shared runs: times from
// arrival to end, and for how long later prompts delayed a long one. Equal options give
// equal rows.
//
// Exit status 1 when a long prompt was delayed by more than its yield share of its own
// time and one step.
#include <prometheus/registry.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "pbs/check.h"
#include "server/engine/cost_model.h"
#include "server/engine/executor.h"

namespace pbs::server {
namespace {

// Of an estimate, not a measurement: Llama-3.1-8B in bf16, dense, on an H200.
//   linear     a layer has 4096 x (6144 + 4096 + 2 x 14336) + 14336 x 4096 = 218 M
//              weights, 32 layers 6.98 G: 13.96 GFLOP a token, at 600 TFLOP/s 23.3 us
//   quadratic  causal half of 4 x 4096 x 32 n^2 FLOP, at 560 TFLOP/s 0.468 ns n^2
//   floor      16 GB of weights at 4.8 TB/s, 3.3 ms, and some 500 launches of 5 us
struct Rates {
  double linear_seconds = 23.3e-6;
  double quadratic_seconds = 0.468e-9;
  double floor_seconds = 6e-3;
  int32_t layers = 32;
};

struct Traffic {
  double seconds = 1200;
  int32_t long_tokens = 131072;
  double long_interval_seconds = 30;  // the first arrives after half of it
  double short_per_second = 10;       // a Poisson process
  int32_t short_tokens_min = 100;     // drawn evenly
  int32_t short_tokens_max = 2000;
  uint64_t seed = 1;
};

struct Rules {
  double yield_share = 0;
  int32_t batch_tokens_max = 1;
  int32_t batch_prompt_tokens_max = 1024;
  double prediction_factor = 1;  // of what the cost model says
};

// The bound is a share of the predicted time; this is what that may be off.
constexpr double kPredictionTolerance = 0.01;

struct Arrival {
  double seconds = 0;
  int32_t tokens = 0;
  bool is_long = false;
};

// A prompt of the run, in order of arrival.
struct Prompt {
  Arrival arrival;
  double own_seconds = 0;
  double total_seconds = 0;           // arrival to end
  double delayed_seconds = 0;         // by later ones
  double later_step_seconds_max = 0;  // of what delayed it
};

class Uniform {
 public:
  explicit Uniform(uint64_t seed) : engine_(seed) {}
  double operator()() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

 private:
  std::mt19937_64 engine_;
};

std::vector<Arrival> DrawArrivals(const Traffic& traffic) {
  std::vector<Arrival> arrivals;
  for (double at = traffic.long_interval_seconds / 2; at < traffic.seconds;
       at += traffic.long_interval_seconds) {
    arrivals.push_back({at, traffic.long_tokens, true});
  }
  Uniform uniform(traffic.seed);
  const double lengths = traffic.short_tokens_max - traffic.short_tokens_min + 1;
  double at = 0;
  while (true) {
    at -= std::log1p(-uniform()) / traffic.short_per_second;
    if (at >= traffic.seconds) break;
    const int32_t tokens =
        traffic.short_tokens_min + static_cast<int32_t>(uniform() * lengths);
    arrivals.push_back({at, tokens, false});
  }
  std::stable_sort(
      arrivals.begin(), arrivals.end(),
      [](const Arrival& a, const Arrival& b) { return a.seconds < b.seconds; });
  return arrivals;
}

// One executor, one run of the traffic through it.
class Simulation {
 public:
  Simulation(const Rules& rules, const Rates& rates) : rules_(rules), rates_(rates) {}

  void Run(std::span<const Arrival> arrivals) {
    begin_ = clock_.Now();
    arrivals_ = arrivals;
    prompts_.clear();
    runs_ = 0;
    busy_seconds_ = 0;
    while (true) {
      if (executor_.RunOneStep()) continue;
      if (prompts_.size() == arrivals_.size()) break;
      Advance(std::max(0.0, arrivals_[prompts_.size()].seconds - Seconds()));
    }
  }

  const std::vector<Prompt>& prompts() const { return prompts_; }
  int64_t runs() const { return runs_; }
  double busy_share() const { return busy_seconds_ / Seconds(); }

 private:
  class SimulatedPrompt;

  double Seconds() const { return absl::ToDoubleSeconds(clock_.Now() - begin_); }
  static Work UnitsOf(std::span<const int32_t> tokens);
  Work CostOf(const Work& units) const;

  // `seconds` pass; who arrives meanwhile is submitted at its moment.
  void Advance(double seconds);
  void Submit(const Arrival& arrival);
  void RunStep(std::span<const size_t> running, double seconds);
  void End(size_t index);

  const Rules rules_;
  const Rates rates_;
  ManualClock clock_;
  TimerQueue timers_{clock_};
  prometheus::Registry registry_;
  EngineMetrics metrics_{registry_};
  CostModel costs_;
  absl::Time begin_;
  std::span<const Arrival> arrivals_;
  std::vector<Prompt> prompts_;
  std::set<size_t> unfinished_;
  int64_t runs_ = 0;
  double busy_seconds_ = 0;
  // A full queue would refuse, which is not what is looked at.
  Executor executor_{{.queue_requests_max = 1 << 20,
                      .yield_share = rules_.yield_share,
                      .batch_tokens_max = rules_.batch_tokens_max},
                     clock_,
                     timers_,
                     metrics_};
};

class Simulation::SimulatedPrompt final : public Job {
 public:
  SimulatedPrompt(Simulation& simulation, size_t index, int32_t tokens)
      : simulation_(simulation), members_{index}, tokens_{tokens} {}

  int32_t batch_tokens() const override {
    const Rules& rules = simulation_.rules_;
    const int32_t tokens = tokens_.front();
    const bool may_share =
        tokens <= rules.batch_prompt_tokens_max && tokens < rules.batch_tokens_max;
    return may_share ? tokens : 0;
  }
  bool RunWith(std::span<Job* const> others) override {
    for (Job* job : others) {
      const auto* other = static_cast<SimulatedPrompt*>(job);
      members_.push_back(other->members_.front());
      tokens_.push_back(other->tokens_.front());
    }
    return true;
  }
  void Start(const JobTiming&) override {}

  absl::StatusOr<StepResult> Step(const RunControl&) override {
    const Work units = UnitsOf(tokens_);
    const Work cost = simulation_.CostOf(units);
    const int32_t layers = simulation_.rates_.layers;
    simulation_.RunStep(members_, (cost.linear + cost.quadratic) / layers);
    const bool done = ++layers_done_ == layers;
    if (done) {
      ++simulation_.runs_;
      simulation_.costs_.Measure({}, units, cost, simulation_.clock_.Now());
    }
    return StepResult{done, static_cast<double>(layers_done_) / layers};
  }

  void Finish(const absl::Status& status) override {
    PBS_CHECK(status.ok());
    simulation_.End(members_.front());
  }

 private:
  Simulation& simulation_;
  std::vector<size_t> members_;  // of its run, itself first
  std::vector<int32_t> tokens_;
  int32_t layers_done_ = 0;
};

Work Simulation::UnitsOf(std::span<const int32_t> tokens) {
  Work units;
  for (double each : tokens) {
    units.linear += each;
    units.quadratic += each * each;
  }
  return units;
}

// Launches and the reading of weights are the linear layers'.
Work Simulation::CostOf(const Work& units) const {
  const double quadratic = rates_.quadratic_seconds * units.quadratic;
  const double linear = rates_.linear_seconds * units.linear;
  return {std::max(linear, rates_.floor_seconds - quadratic), quadratic};
}

void Simulation::Advance(double seconds) {
  const absl::Time end = clock_.Now() + absl::Seconds(seconds);
  while (prompts_.size() < arrivals_.size()) {
    const Arrival& arrival = arrivals_[prompts_.size()];
    const absl::Time at = begin_ + absl::Seconds(arrival.seconds);
    if (at > end) break;
    clock_.Advance(std::max(at - clock_.Now(), absl::ZeroDuration()));
    Submit(arrival);
  }
  clock_.Advance(end - clock_.Now());
}

void Simulation::Submit(const Arrival& arrival) {
  const size_t index = prompts_.size();
  prompts_.push_back({.arrival = arrival});
  unfinished_.insert(index);
  JobSize size;
  size.prompt_tokens = arrival.tokens;
  size.num_steps = rates_.layers;
  size.prediction = costs_.Predict({}, UnitsOf({{arrival.tokens}}), clock_.Now());
  if (size.prediction.has_value()) {
    size.prediction->seconds *= rules_.prediction_factor;
  }
  const auto admission = executor_.Submit(
      {}, size, std::make_unique<SimulatedPrompt>(*this, index, arrival.tokens));
  PBS_CHECK(admission.ok());
}

void Simulation::RunStep(std::span<const size_t> running, double seconds) {
  const size_t last = *std::max_element(running.begin(), running.end());
  for (size_t index : running) prompts_[index].own_seconds += seconds;
  for (size_t index : unfinished_) {
    if (index >= last) break;
    if (std::find(running.begin(), running.end(), index) != running.end()) continue;
    Prompt& prompt = prompts_[index];
    prompt.delayed_seconds += seconds;
    prompt.later_step_seconds_max = std::max(prompt.later_step_seconds_max, seconds);
  }
  busy_seconds_ += seconds;
  Advance(seconds);
}

void Simulation::End(size_t index) {
  unfinished_.erase(index);
  prompts_[index].total_seconds = Seconds() - prompts_[index].arrival.seconds;
}

// ---- what is said about a run

bool IsInBound(const Prompt& prompt, double yield_share) {
  if (yield_share == 0) return prompt.delayed_seconds == 0;
  return prompt.delayed_seconds <=
         yield_share * prompt.own_seconds * (1 + kPredictionTolerance) +
             prompt.later_step_seconds_max;
}

// The smallest that at least `share` of the values do not exceed; 0 without any.
double Quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(share * static_cast<double>(values.size()));
  return values[static_cast<size_t>(std::max(rank, 1.0)) - 1];
}

nlohmann::json Times(const std::vector<Prompt>& prompts, bool is_long) {
  std::vector<double> totals;
  for (const Prompt& prompt : prompts) {
    if (prompt.arrival.is_long == is_long) totals.push_back(prompt.total_seconds);
  }
  return {{"prompts", totals.size()},
          {"p50_seconds", Quantile(totals, 0.5)},
          {"p99_seconds", Quantile(totals, 0.99)},
          {"max_seconds", Quantile(totals, 1)}};
}

nlohmann::json Row(const Simulation& simulation, const Rules& rules) {
  const std::vector<Prompt>& prompts = simulation.prompts();
  nlohmann::json of_long = Times(prompts, true);
  double share_max = 0, own_max = 0, step_max = 0;
  bool holds = true;
  for (const Prompt& prompt : prompts) {
    if (!prompt.arrival.is_long) continue;
    own_max = std::max(own_max, prompt.own_seconds);
    share_max = std::max(share_max, prompt.delayed_seconds / prompt.own_seconds);
    step_max = std::max(step_max, prompt.later_step_seconds_max);
    holds = holds && IsInBound(prompt, rules.yield_share);
  }
  of_long["own_seconds_max"] = own_max;
  of_long["delay_share_max"] = share_max;
  of_long["later_step_seconds_max"] = step_max;
  return {{"yield_share", rules.yield_share},
          {"batch_tokens_max", rules.batch_tokens_max},
          {"short", Times(prompts, false)},
          {"long", of_long},
          {"runs", simulation.runs()},
          {"prompts_per_run",
           static_cast<double>(prompts.size()) /
               static_cast<double>(std::max<int64_t>(simulation.runs(), 1))},
          {"busy_share", simulation.busy_share()},
          {"bound_holds", holds}};
}

nlohmann::json RunRules(const Rules& rules, const Rates& rates,
                        const Traffic& traffic) {
  Simulation simulation(rules, rates);
  // One of each kind, so that the cost model has measured something.
  const int32_t short_tokens =
      (traffic.short_tokens_min + traffic.short_tokens_max) / 2;
  simulation.Run(
      std::vector<Arrival>{{0, traffic.long_tokens, true}, {0, short_tokens, false}});
  simulation.Run(DrawArrivals(traffic));
  return Row(simulation, rules);
}

struct Options {
  Rates rates;
  Traffic traffic;
  Rules rules = {.batch_tokens_max = 8192};
  std::vector<double> yield_shares = {0, 0.1, 0.25, 0.5};
};

void AddOptions(CLI::App& app, Options& options) {
  const auto positive = CLI::PositiveNumber;
  const auto number = [&](const char* name, auto& value, const char* what) {
    return app.add_option(name, value, what)->capture_default_str();
  };
  Rates& rates = options.rates;
  number("--linear", rates.linear_seconds, "seconds a token")->check(positive);
  number("--quadratic", rates.quadratic_seconds, "seconds a token^2")->check(positive);
  number("--floor", rates.floor_seconds, "seconds a run takes at least")
      ->check(CLI::NonNegativeNumber);
  number("--layers", rates.layers, "steps of a run")->check(positive);
  Traffic& traffic = options.traffic;
  number("--seconds", traffic.seconds, "prompts arrive for so long")->check(positive);
  number("--long-tokens", traffic.long_tokens, "of a long prompt")->check(positive);
  number("--long-interval", traffic.long_interval_seconds, "seconds between two")
      ->check(positive);
  number("--short-rate", traffic.short_per_second, "short prompts a second")
      ->check(positive);
  number("--short-tokens-min", traffic.short_tokens_min, "of a short one")
      ->check(positive);
  number("--short-tokens-max", traffic.short_tokens_max, "of a short one")
      ->check(positive);
  number("--seed", traffic.seed, "of the arrivals");
  Rules& rules = options.rules;
  number("--yield-share", options.yield_shares, "one or several")
      ->check(CLI::Range(0.0, 1.0));
  number("--batch-tokens-max", rules.batch_tokens_max, "of shared runs")
      ->check(positive);
  number("--batch-prompt-tokens-max", rules.batch_prompt_tokens_max,
         "of a prompt that shares a run")
      ->check(positive);
  number("--prediction-factor", rules.prediction_factor,
         "the server predicts so many times what its cost model says")
      ->check(positive);
}

int Main(int argc, char** argv) {
  CLI::App app("Simulates the queue of pbs-prefilld under long and short prompts");
  Options options;
  AddOptions(app, options);
  CLI11_PARSE(app, argc, argv);
  const Rates& rates = options.rates;
  const Traffic& traffic = options.traffic;
  if (traffic.short_tokens_min > traffic.short_tokens_max) {
    std::cerr << "--short-tokens-min " << traffic.short_tokens_min
              << " exceeds --short-tokens-max " << traffic.short_tokens_max << "\n";
    return 2;
  }
  nlohmann::json rows = nlohmann::json::array();
  bool holds = true;
  for (double yield_share : options.yield_shares) {
    for (int32_t batch_tokens_max : {1, options.rules.batch_tokens_max}) {
      Rules rules = options.rules;
      rules.yield_share = yield_share;
      rules.batch_tokens_max = batch_tokens_max;
      rows.push_back(RunRules(rules, rates, traffic));
      holds = holds && rows.back()["bound_holds"].get<bool>();
    }
  }
  const nlohmann::json written = {
      {"rates",
       {{"linear_seconds", rates.linear_seconds},
        {"quadratic_seconds", rates.quadratic_seconds},
        {"floor_seconds", rates.floor_seconds},
        {"layers", rates.layers}}},
      {"traffic",
       {{"seconds", traffic.seconds},
        {"long_tokens", traffic.long_tokens},
        {"long_interval_seconds", traffic.long_interval_seconds},
        {"short_per_second", traffic.short_per_second},
        {"short_tokens_min", traffic.short_tokens_min},
        {"short_tokens_max", traffic.short_tokens_max},
        {"seed", traffic.seed}}},
      {"batch_prompt_tokens_max", options.rules.batch_prompt_tokens_max},
      {"prediction_factor", options.rules.prediction_factor},
      {"rows", rows}};
  std::cout << written.dump(1) << std::endl;
  if (!holds) std::cerr << "a long prompt was delayed by more than its yield share\n";
  return holds ? 0 : 1;
}

}  // namespace
}  // namespace pbs::server

int main(int argc, char** argv) { return pbs::server::Main(argc, argv); }
