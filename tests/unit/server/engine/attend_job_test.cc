// Spec: raw attention through server/engine/engine.h, on the real CPU backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "reference/reference_attention.h"
#include "server/engine/attend_task.h"
#include "tests/support/attention_case.h"
#include "tests/unit/server/engine/engine_fixture.h"

namespace pbs::server {
namespace {

using testing::HasSubstr;
using testing_support::AttentionCase;

class AttendJobSpec : public EngineFixture {
 protected:
  static AttentionProblem Problem(AttentionOptions options, int32_t seq_len = 150) {
    AttentionProblem problem;
    problem.shape = {.num_heads = 4,
                     .num_kv_heads = 2,
                     .head_dim = 64,
                     .sequences = {{seq_len, seq_len}}};
    problem.options = options;
    return problem;
  }

  static HostBytes Copy(const void* data, int64_t bytes) {
    HostBytes copy = *HostBytes::Allocate(bytes);
    std::memcpy(copy.data(), data, static_cast<size_t>(bytes));
    return copy;
  }

  // A job over `inputs` with its memory reserved; wants everything.
  AttendJob MakeAttend(AttentionCase& inputs, bool want_all = true) {
    const AttentionGeometry& g = inputs.geometry();
    const AttentionTensors tensors = inputs.Tensors();
    const int64_t q_bytes = int64_t{4} * g.num_heads * g.total_q * g.head_dim;
    const int64_t k_bytes = int64_t{4} * g.num_kv_heads * g.total_k * g.head_dim;
    AttendJob job;
    job.problem = inputs.problem();
    job.q = {Copy(tensors.q.data, q_bytes), tensors.q.layout};
    job.k = {Copy(tensors.k.data, k_bytes), tensors.k.layout};
    job.v = {Copy(tensors.v.data, k_bytes), tensors.v.layout};
    job.o_layout = tensors.o.layout;
    job.lse_layout = tensors.lse.layout;
    job.wanted = {want_all, want_all, want_all};
    auto reserved = engine_.ReserveAttend(job.problem, job.wanted);
    EXPECT_TRUE(reserved.ok()) << reserved.status();
    job.reservation = *std::move(reserved);
    return job;
  }

  AttendRecorder listener_;
};

TEST_F(AttendJobSpec, AgreesWithTheReferenceUnderItsOwnBlocks) {
  AttentionCase inputs(Problem(SmallPbs()), /*seed=*/3);
  ASSERT_TRUE(engine_.SubmitAttend(MakeAttend(inputs), listener_).ok());
  RunAll();
  ASSERT_TRUE(listener_.result.ok()) << listener_.result.status();
  const AttendResult& result = *listener_.result;
  const reference::Output expected =
      reference::Attend(inputs.problem(), inputs.Tensors(),
                        {result.report.order, result.report.lists, 0});
  const auto* o = reinterpret_cast<const float*>(result.o.data());
  const auto* lse = reinterpret_cast<const float*>(result.lse.data());
  for (size_t i = 0; i < expected.o.size(); ++i) {
    ASSERT_NEAR(o[i], expected.o[i], 2e-5) << i;
  }
  for (size_t i = 0; i < expected.lse.size(); ++i) {
    ASSERT_NEAR(lse[i], expected.lse[i], 2e-5) << i;
  }
  EXPECT_EQ(result.report.stats.method_run, Method::kPbs);
  EXPECT_EQ(listener_.num_done, 1);
}

TEST_F(AttendJobSpec, ReturnsOnlyWhatIsWanted) {
  AttentionCase inputs(Problem(SmallPbs()), 3);
  ASSERT_TRUE(engine_.SubmitAttend(MakeAttend(inputs, false), listener_).ok());
  RunAll();
  ASSERT_TRUE(listener_.result.ok());
  EXPECT_TRUE(listener_.result->lse.empty());
  EXPECT_TRUE(listener_.result->report.order.empty());
  EXPECT_TRUE(listener_.result->report.lists.indices.empty());
}

TEST_F(AttendJobSpec, ReadsGivenOrdersAndLists) {
  AttentionCase inputs(Problem(SmallPbs()), 3);
  ASSERT_TRUE(engine_.SubmitAttend(MakeAttend(inputs), listener_).ok());
  RunAll();
  ASSERT_TRUE(listener_.result.ok());
  const AttendResult chosen = *std::move(listener_.result);

  AttentionOptions given = SmallPbs();
  given.use_given_order = given.use_given_lists = true;
  AttentionCase again(Problem(given), 3);
  AttendJob job = MakeAttend(again);
  const auto order_bytes =
      static_cast<int64_t>(chosen.report.order.size() * sizeof(int32_t));
  job.order = {Copy(chosen.report.order.data(), order_bytes), PackedLayout(150, 1)};
  job.lists = chosen.report.lists;
  AttendRecorder listener;
  ASSERT_TRUE(engine_.SubmitAttend(std::move(job), listener).ok());
  RunAll();
  ASSERT_TRUE(listener.result.ok()) << listener.result.status();
  EXPECT_EQ(std::memcmp(listener.result->o.data(), chosen.o.data(),
                        static_cast<size_t>(chosen.o.size())),
            0);
}

TEST_F(AttendJobSpec, RepeatsAndReportsEveryRepetitionButNoWarmup) {
  AttentionCase inputs(Problem(SmallPbs()), 3);
  AttendJob job = MakeAttend(inputs);
  job.warmup = 2;
  job.repetitions = 3;
  ASSERT_TRUE(engine_.SubmitAttend(std::move(job), listener_).ok());
  RunSteps(5);
  ASSERT_TRUE(listener_.result.ok()) << listener_.result.status();
  ASSERT_EQ(listener_.result->iterations.size(), 3u);
  for (const AttendIteration& iteration : listener_.result->iterations) {
    EXPECT_GT(iteration.attend_seconds, 0);
  }
  const double flops = listener_.result->report.stats.executed_flops;
  EXPECT_DOUBLE_EQ(metrics_.engine.flops_computed.Value(), 5 * flops);
}

TEST_F(AttendJobSpec, KeepsOnlyTheResultCharged) {
  AttentionCase inputs(Problem(SmallPbs()), 3);
  AttendJob job = MakeAttend(inputs);
  const int64_t charged = ledger_.bytes_held();
  ASSERT_TRUE(engine_.SubmitAttend(std::move(job), listener_).ok());
  EXPECT_EQ(ledger_.bytes_held(), charged);
  RunAll();
  ASSERT_TRUE(listener_.result.ok());
  const AttendResult& result = *listener_.result;
  EXPECT_EQ(ledger_.bytes_held(), result.reservation.bytes());
  EXPECT_GE(ledger_.bytes_held(), result.o.size() + result.lse.size());
  EXPECT_LT(ledger_.bytes_held(), charged);
  listener_.result = absl::UnknownError("dropped");
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

TEST_F(AttendJobSpec, ChargesInputsWorkspaceAndOutputs) {
  const AttentionProblem problem = Problem(SmallPbs());
  const auto plan = *TestModel::TheBackend().Plan(problem);
  const AttendBytes all = BytesOfAttend(*plan, {true, true, true});
  const AttendBytes o_only = BytesOfAttend(*plan, {});
  const int64_t q = int64_t{4} * 4 * 150 * 64;
  EXPECT_EQ(all.inputs, 2 * q);  // two KV heads for four query heads: k and v are one q
  EXPECT_EQ(all.workspace, plan->workspace_bytes);
  EXPECT_EQ(o_only.outputs, q);
  const int64_t lse = 4 * 4 * 150;
  const int64_t order = 4 * 2 * 150;
  const int64_t rows = 4 * 10;
  const int64_t lists = rows * 12 + 2 * plan->geometry.total_entries;
  EXPECT_EQ(all.outputs, q + lse + order + lists);
}

TEST_F(AttendJobSpec, ANumericErrorOfTheBackendIsAStatusAndFreesEverything) {
  AttentionCase inputs(Problem(SmallPbs()), 3);
  for (auto* bytes : {&inputs.q_bytes(), &inputs.k_bytes()}) {
    auto* values = reinterpret_cast<float*>(bytes->data());
    for (size_t i = 0; i < bytes->size() / sizeof(float); ++i) values[i] = 3e38f;
  }
  ASSERT_TRUE(engine_.SubmitAttend(MakeAttend(inputs), listener_).ok());
  RunAll();
  EXPECT_EQ(listener_.result.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(listener_.num_done, 1);
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

TEST_F(AttendJobSpec, AProblemThatCannotBePlannedIsRefusedBeforeItIsCharged) {
  AttentionProblem problem = Problem(SmallPbs());
  problem.shape.head_dim = 80;
  const auto reserved = engine_.ReserveAttend(problem, {true, true, true});
  EXPECT_EQ(reserved.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(reserved.status().message()), HasSubstr("head_dim 80"));
}

TEST_F(AttendJobSpec, CancelBetweenTwoRepetitionsFreesEverything) {
  AttentionCase inputs(Problem(SmallPbs()), 3);
  AttendJob job = MakeAttend(inputs);
  job.repetitions = 3;
  const JobId id = engine_.SubmitAttend(std::move(job), listener_)->id;
  RunSteps(1);
  engine_.Cancel(id, CancelReason::kCaller);
  RunAll();
  EXPECT_EQ(listener_.result.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(listener_.num_done, 1);
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

TEST_F(AttendJobSpec, CancelWhileWaitingFreesEverythingAtOnce) {
  AttentionCase inputs(Problem(SmallPbs()), 3);
  const JobId id = engine_.SubmitAttend(MakeAttend(inputs), listener_)->id;
  engine_.Cancel(id, CancelReason::kCaller);
  EXPECT_EQ(listener_.result.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

TEST_F(AttendJobSpec, ARefusedAttendFreesEverything) {
  engine_.Drain([] {});
  AttentionCase inputs(Problem(SmallPbs()), 3);
  EXPECT_EQ(engine_.SubmitAttend(MakeAttend(inputs), listener_).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(listener_.num_done, 0);
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

TEST_F(AttendJobSpec, PredictsOnceSomethingWasMeasured) {
  AttentionCase inputs(Problem(Dense()), 3);
  EXPECT_EQ(engine_.SubmitAttend(MakeAttend(inputs), listener_)->predicted_seconds, 0);
  RunAll();
  AttendJob job = MakeAttend(inputs);
  job.repetitions = 2;
  AttendRecorder twice;
  const double two_runs =
      engine_.SubmitAttend(std::move(job), twice)->predicted_seconds;
  EXPECT_GT(two_runs, 0);
  RunAll();
}

}  // namespace
}  // namespace pbs::server
