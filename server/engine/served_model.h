// A model that the server offers.
//
// Threading: immutable after loading. Any thread may read its name and facts; only the
// executor reads its weights.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "server/engine/profile.h"
#include "server/model/model.h"

namespace pbs::server {

struct ServedModel {
  const Model& model() const { return *replicas.front(); }

  std::string name;
  // One model per device, in the order of the engine's replicas, all with the same
  // digest.
  std::vector<std::unique_ptr<Model>> replicas;
  // Each with a name of its own.
  std::vector<Profile> profiles = {PaperProfile()};
  // Longest prompt: the lowest of the model's and the server's limits
  int32_t tokens_max = 0;
};

}  // namespace pbs::server
