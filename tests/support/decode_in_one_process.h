// The answer that a decode tier must give.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "pbs/cpu_backend.h"
#include "server/model/decode.h"
#include "server/model/prefill.h"
#include "server/model/sampling.h"

namespace pbs::testing_support {

// What one process that does everything, with dense attention, decodes after a prompt
// and the tokens behind it.
inline std::vector<int32_t> DecodeInOneProcess(const std::string& folder,
                                               std::span<const int32_t> prompt,
                                               std::span<const int32_t> then_tokens,
                                               size_t num_new_tokens) {
  const auto backend = *CreateCpuBackend({.num_threads = 1});
  const auto model = *Model::Load(folder, {}, *backend);
  const auto num_tokens = static_cast<int32_t>(prompt.size());
  const PrefillPlan plan =
      *PlanPrefill(*model, {.num_tokens = num_tokens,
                            .attention = {.method = Method::kDense},
                            .logit_rows = {num_tokens - 1}});
  KvCache cache = *KvCache::Create(model->kv_shape(num_tokens + 64), *backend);
  Buffer workspace = *backend->Allocate(plan.workspace_bytes);
  const auto run = *PrefillRun::Start(*model, plan, {.tokens = prompt}, cache,
                                      workspace.workspace());
  while (!run->layers_done()) EXPECT_TRUE(run->RunLayer(nullptr, {}).ok());
  EXPECT_TRUE(run->ComputeLogits().ok());
  std::vector<float> logits(static_cast<size_t>(model->config().vocab_size));
  EXPECT_TRUE(run->ReadLogits(0, logits).ok());
  int32_t next = Argmax(logits);
  const auto decoder = *Decoder::Create(*model, cache);
  for (const int32_t token : then_tokens) next = Argmax(*decoder->Step(token));
  std::vector<int32_t> tokens = {next};
  while (tokens.size() < num_new_tokens) {
    tokens.push_back(next = Argmax(*decoder->Step(next)));
  }
  return tokens;
}

}  // namespace pbs::testing_support
