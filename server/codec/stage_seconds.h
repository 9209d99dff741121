// StageTimes -> v1::StageSeconds.
#pragma once

#include "pbs/v1/types.pb.h"
#include "server/engine/engine.h"

namespace pbs::server {

inline v1::StageSeconds EncodeStages(const StageTimes& times) {
  v1::StageSeconds wire;
  wire.set_queue(times.queue);
  wire.set_embed(times.embed);
  wire.set_qkv(times.qkv);
  wire.set_permute(times.permute);
  wire.set_select(times.select);
  wire.set_attend(times.attend);
  wire.set_mlp(times.mlp);
  wire.set_copy(times.copy);
  return wire;
}

}  // namespace pbs::server
