// Spec: server/model/captured_queries.h, and PrefillInputs::queries.
#include "server/model/captured_queries.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/model/tiny_prefill.h"

namespace pbs::tiny_prefill {
namespace {

using testing::ElementsAre;

constexpr int32_t kTokens = 30;

CapturedQueries Capture(const Model& model, int32_t num_tokens,
                        std::vector<int32_t> layers) {
  return *CapturedQueries::Create(model.query_shape(num_tokens), std::move(layers),
                                  model.backend());
}

class CaptureSpec : public PrefillRunSpec {
 protected:
  Status Run(const PrefillProblem& problem, CapturedQueries& queries) {
    const PrefillPlan plan = *PlanPrefill(*model_, problem);
    KvCache cache = MakeCache(*model_, kTokens);
    const Buffer workspace = *backend_->Allocate(plan.workspace_bytes);
    auto run =
        PrefillRun::Start(*model_, plan, {.tokens = tokens_, .queries = &queries},
                          cache, workspace.workspace());
    if (!run.ok()) return run.status();
    while (!(*run)->layers_done()) PBS_RETURN_IF_ERROR((*run)->RunLayer(nullptr, {}));
    return OkStatus();
  }

  const std::vector<int32_t> tokens_ = RandomTokens(kTokens, 5);
  const PrefillProblem problem_ = {.num_tokens = kTokens, .attention = kDenseOptions};
};

TEST_F(CaptureSpec, TheQueriesAreThoseOfTheReferenceAfterRotation) {
  ReferenceModel reference(tiny_);
  reference.Logits(tokens_);
  CapturedQueries queries = Capture(*model_, kTokens, {0, 2});
  ASSERT_TRUE(Run(problem_, queries).ok());
  for (int32_t layer : {0, 2}) {
    const auto* captured = static_cast<const float*>(queries.data(layer));
    std::vector<std::vector<float>> rows;
    const size_t width = reference.queries()[layer][0].size();
    for (int32_t t = 0; t < kTokens; ++t) {
      rows.emplace_back(captured + t * width, captured + (t + 1) * width);
    }
    EXPECT_LE(Difference(rows, reference.queries()[layer]), kF32Max) << layer;
  }
}

TEST_F(CaptureSpec, QueriesOfAnotherLengthAreRefused) {
  CapturedQueries queries = Capture(*model_, kTokens + 1, {0});
  EXPECT_EQ(Run(problem_, queries).message(),
            "the captured queries were made for another run");
}

TEST_F(CaptureSpec, PromptsThatShareARunCaptureNothing) {
  CapturedQueries queries = Capture(*model_, kTokens, {0});
  PrefillProblem shared = problem_;
  shared.prompt_tokens = {10, kTokens - 10};
  EXPECT_EQ(Run(shared, queries).message(),
            "the captured queries were made for another run");
}

TEST_F(CaptureSpec, HoldsTheBytesOfTheChosenLayersOnly) {
  const CapturedQueries queries = Capture(*model_, kTokens, {0, 2});
  const QueryShape shape = model_->query_shape(kTokens);
  EXPECT_EQ(queries.bytes(), 2 * shape.layer_bytes());
  EXPECT_THAT(queries.layers(), ElementsAre(0, 2));
  EXPECT_EQ(queries.data(1), nullptr);
  EXPECT_EQ(static_cast<char*>(queries.data(2)) - static_cast<char*>(queries.data(0)),
            shape.layer_bytes());
  EXPECT_EQ(CapturedQueries().bytes(), 0);
}

TEST_F(CaptureSpec, NamesTheNextCapturedLayerOfARange) {
  const CapturedQueries queries = Capture(*model_, kTokens, {0, 2});
  EXPECT_EQ(queries.NextLayer(0, 3), 0);
  EXPECT_EQ(queries.NextLayer(1, 3), 2);
  EXPECT_EQ(queries.NextLayer(1, 2), 2);
  EXPECT_EQ(queries.NextLayer(3, 3), 3);
}

}  // namespace
}  // namespace pbs::tiny_prefill
