// Spec: server/engine/self_test.h.
#include "server/engine/self_test.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>

#include "pbs/cpu_backend.h"

namespace pbs::server {
namespace {

using testing::HasSubstr;

std::unique_ptr<Backend> CpuBackend() { return *CreateCpuBackend({.num_threads = 1}); }

// Passes calls on and then spoils what came out.
class SpoiledBackend : public AttentionBackend {
 public:
  explicit SpoiledBackend(AttentionBackend& backend) : backend_(backend) {}

  StatusOr<std::unique_ptr<AttentionPlan>> Plan(
      const AttentionProblem& problem) const override {
    return backend_.Plan(problem);
  }
  Status Run(const AttentionPlan& plan, const AttentionTensors& tensors,
             Workspace workspace, const RunControl& control) override {
    Status status = backend_.Run(plan, tensors, workspace, control);
    if (status.ok()) SpoilOutput(plan, tensors);
    return status;
  }
  Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                    const ReportRequest& request, AttentionReport* report) override {
    Status status = backend_.ReadReport(plan, workspace, request, report);
    SpoilReport(plan, *report);
    return status;
  }
  Status StartReport(const AttentionPlan& plan, Workspace workspace) override {
    return backend_.StartReport(plan, workspace);
  }
  Status FinishReport(const AttentionPlan& plan, AttentionReport* report) override {
    return backend_.FinishReport(plan, report);
  }

  virtual void SpoilOutput(const AttentionPlan&, const AttentionTensors&) {}
  virtual void SpoilReport(const AttentionPlan&, AttentionReport&) {}

 private:
  AttentionBackend& backend_;
};

TEST(SelfTest, TheCpuBackendPassesEveryCase) {
  const auto backend = CpuBackend();
  const auto report = RunSelfTest(*backend, *backend);
  ASSERT_TRUE(report.ok()) << report.status();
  // Of three dtypes: dense; pbs with its scopes and corrected, and six more methods,
  // in blocks of 32 and of 128; one with sorted keys.
  EXPECT_EQ(report->num_cases, 3 * (1 + 2 * (3 + 6) + 1));
  EXPECT_LE(report->worst_f32_error, 2e-5);
}

TEST(SelfTest, OneWrongElementFails) {
  class OneWrong final : public SpoiledBackend {
   public:
    using SpoiledBackend::SpoiledBackend;
    void SpoilOutput(const AttentionPlan&, const AttentionTensors& tensors) override {
      static_cast<float*>(tensors.o.data)[12345] += 1e-3f;
    }
  };
  const auto backend = CpuBackend();
  OneWrong wrong(*backend);
  const absl::Status status = RunSelfTest(wrong, *backend).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("self-test \"dense f32\""));
}

TEST(SelfTest, ANaNFails) {
  class OneNan final : public SpoiledBackend {
   public:
    using SpoiledBackend::SpoiledBackend;
    void SpoilOutput(const AttentionPlan&, const AttentionTensors& tensors) override {
      static_cast<float*>(tensors.o.data)[7] = NAN;
    }
  };
  const auto backend = CpuBackend();
  OneNan wrong(*backend);
  EXPECT_EQ(RunSelfTest(wrong, *backend).status().code(), absl::StatusCode::kInternal);
}

TEST(SelfTest, OtherBlocksThanTheReferencesFail) {
  // Exact attention over the wrong blocks: only the count gives it away.
  class DenseInstead final : public SpoiledBackend {
   public:
    explicit DenseInstead(AttentionBackend& backend)
        : SpoiledBackend(backend), backend_(backend) {}
    StatusOr<std::unique_ptr<AttentionPlan>> Plan(
        const AttentionProblem& problem) const override {
      AttentionProblem loose = problem;
      if (problem.options.method == Method::kPbs) loose.options.threshold = 1;
      return backend_.Plan(loose);
    }

   private:
    AttentionBackend& backend_;
  };
  const auto backend = CpuBackend();
  DenseInstead wrong(*backend);
  const absl::Status status = RunSelfTest(wrong, *backend).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("blocks selected"));
}

TEST(SelfTest, OtherLinesThanTheReferencesFail) {
  // Exact attention over fewer columns: the lists are the same.
  class FewerLines final : public SpoiledBackend {
   public:
    explicit FewerLines(AttentionBackend& backend)
        : SpoiledBackend(backend), backend_(backend) {}
    StatusOr<std::unique_ptr<AttentionPlan>> Plan(
        const AttentionProblem& problem) const override {
      AttentionProblem fewer = problem;
      if (problem.options.method == Method::kMInference) {
        fewer.options.vertical_tokens = 1;
      }
      return backend_.Plan(fewer);
    }

   private:
    AttentionBackend& backend_;
  };
  const auto backend = CpuBackend();
  FewerLines wrong(*backend);
  const absl::Status status = RunSelfTest(wrong, *backend).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()), HasSubstr("columns and distances"));
}

TEST(SelfTest, AFailureOfTheBackendIsPassedOn) {
  class Failing final : public SpoiledBackend {
   public:
    using SpoiledBackend::SpoiledBackend;
    StatusOr<std::unique_ptr<AttentionPlan>> Plan(
        const AttentionProblem&) const override {
      return Unimplemented("no kernels here");
    }
  };
  const auto backend = CpuBackend();
  Failing failing(*backend);
  EXPECT_EQ(RunSelfTest(failing, *backend).status(),
            absl::UnimplementedError("no kernels here"));
}

}  // namespace
}  // namespace pbs::server
