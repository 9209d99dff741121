// The way of a prompt: prefilled there, its KV cache fetched while that goes on,
// decoded here. The fetch is opened as soon as the server admits the prompt and follows
// it layer by layer, so that the cache is here a moment after the last layer is done.
//
// Nothing is decoded from a cache of another model, and with checksums nothing from one
// that changed on the way. Whatever happens, a lease that was taken is given back
// (unless Settings::keep_lease).
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
  std::string model;  // as the server names it
  int32_t prompt_tokens = 0;
  std::optional<v1::PrefillStats> prefill;  // none when it was done before
  v1::KvTicket ticket;
  int64_t kv_bytes = 0;        // as fetched
  double prefill_seconds = 0;  // request to `done`
  double kv_tail_seconds = 0;  // from there until the last layer was in place
  double decode_seconds = 0;
  int32_t decode_steps = 0;     // forward passes: tokens fed behind the prompt
  std::vector<int32_t> tokens;  // decoded
};

// FailedPrecondition when the server's model is not `model`; InvalidArgument for a
// prompt that does not fit; DataLoss for a corrupt cache; otherwise the server's error.
absl::StatusOr<Outcome> RunJourney(const Settings& settings, const Model& model,
                                   client::Client& client, Progress& progress);

}  // namespace pbs::decode
