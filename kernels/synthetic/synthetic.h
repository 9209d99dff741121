// Synthetic Q, K and V for benchmarks: white noise, and data with the structure of
// attention over long prompts.
//
// All terms are in logit units (after the factor 1/sqrt(head_dim)). Each KV head has
// orthonormal directions u (importance), w_1..w_C (topics) and z (importance that the
// proxy queries do not see) on the slow rotary pairs (frequency * seq_len < 0.6), which
// positions hardly rotate. It also has a normalised +-1 vector e on the fast pairs
// (frequency > 2 pi / 512), whose rotated product peaks at distance 0.
//
//   imp_j = sigma_token N + sigma_segment AR1_j(correlation_len)
//           + heavy [Bernoulli(p_heavy)] + sink [j < num_sinks]
//   k_j   = noise n_j + sqrt(D) (rho imp_j u + sqrt(1 - rho^2) sigma_token N z
//           + [topic > 0] w_label(j)) + local D^(1/4) e
//   q_i   = n_i + gain_h (1 + jitter N) u + sign_h(label(i)) z + topic w_label(i)
//           + local D^(1/4) e
//   v_j   = N
//
// N is a fresh standard normal, n_i a vector of them without its parts along u, w and
// z; gain_h is uniform in [0.8, 1.2] per query head, sign_h one sign per topic; the
// label changes with probability 1 / piece per token. q and k are then rotated (half
// split, `rope_base`). A permutation saves most when importance is spread over many
// keys (sigma_token >= ~2). White noise is the worst case.
//
// Threading: stateless. Memory: a few values per token of one KV head.
// Determinism: every element depends only on the seed and its position.
#pragma once

#include <atomic>
#include <cstdint>

#include "pbs/dtype.h"
#include "pbs/status.h"

namespace pbs {

struct SyntheticSetting {
  double sigma_token = 3;
  double sigma_segment = 0.4;
  double correlation_len = 512;  // tokens
  double heavy = 0;
  double p_heavy = 0;
  double sink = 6;
  int32_t num_sinks = 4;
  double topic = 0.5;
  int32_t num_topics = 6;  // 1 .. 6
  double piece = 700;      // tokens, mean length
  double local = 2;
  double noise = 1;
  double rho = 1;  // share of importance that all queries have in common
  double jitter = 0.25;
  double rope_base = 500'000;
};

struct SyntheticShape {
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;  // divides num_heads
  int32_t seq_len = 0;
  int32_t head_dim = 0;  // even, at least 16
};

// q [num_heads, seq_len, head_dim], k and v [num_kv_heads, seq_len, head_dim]
struct SyntheticTargets {
  DType dtype = DType::kF32;
  void* q = nullptr;
  void* k = nullptr;
  void* v = nullptr;
};

// Fills the targets with sequence `sequence` of the batch that `seed` names. Cancelled
// when `stop` (may be null) turns true between two blocks of rows; the targets are then
// partly written.
Status GenerateStructured(const SyntheticShape& shape, const SyntheticSetting& setting,
                          uint64_t seed, int32_t sequence,
                          const SyntheticTargets& targets,
                          const std::atomic<bool>* stop);

// As GenerateStructured(), but every element is a standard normal.
Status GenerateWhiteNoise(const SyntheticShape& shape, uint64_t seed, int32_t sequence,
                          const SyntheticTargets& targets,
                          const std::atomic<bool>* stop);

}  // namespace pbs
