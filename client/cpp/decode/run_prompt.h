// Runs one prompt: the server prefills it, this process fetches its KV cache meanwhile
// and decodes from it. The fetch starts as soon as the server admits the prompt and
// follows it layer by layer, so that the cache is complete shortly after the last
// layer.
//
// A cache of another model is refused, and with checksums so is a cache whose bytes
// changed in transfer. The lease is released at the end, after errors too (unless
// Settings::keep_lease).
//
// Threading: one caller; the fetch runs on a thread of its own.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/client.h"
#include "client/cpp/decode/progress.h"
#include "client/cpp/decode/settings.h"
#include "pbs/v1/kv.pb.h"
#include "pbs/v1/prefill.pb.h"
#include "server/model/model.h"

namespace pbs::decode {

struct Outcome {
  std::string model;  // its name at the server
  int32_t prompt_tokens = 0;
  std::optional<v1::PrefillStats> prefill;  // none when an earlier call did the prefill
  v1::KvTicket ticket;
  int64_t kv_bytes = 0;        // as fetched
  double prefill_seconds = 0;  // request to `done`
  double kv_tail_seconds = 0;  // from `done` until the last layer was in place
  double decode_seconds = 0;
  int32_t decode_steps = 0;     // forward passes: tokens fed after the prompt
  std::vector<int32_t> tokens;  // decoded
};

// FailedPrecondition when the server's model is not `model`; InvalidArgument for a
// prompt that does not fit; DataLoss for a corrupt cache; otherwise the server's error.
absl::StatusOr<Outcome> RunPrompt(const Settings& settings, const Model& model,
                                  client::Client& client, Progress& progress);

}  // namespace pbs::decode
