// A model as the server offers it.
//
// Threading: immutable after loading; its name and facts are read from any thread, its
// weights by the executor only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "server/model/model.h"

namespace pbs::server {

struct ServedModel {
  const Model& model() const { return *replicas.front(); }

  std::string name;
  // One on every device, in the order of the engine's replicas; all of one digest.
  std::vector<std::unique_ptr<Model>> replicas;
  int32_t tokens_max = 0;  // longest prompt: the least of the model's and our limits
};

}  // namespace pbs::server
