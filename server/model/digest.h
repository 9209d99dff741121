// The model digest. A decode tier compares it before it uses a cache of another
// process.
//
// XXH3-128 over the canonical architecture line (model_config.h), then, for every
// tensor that the model uses, in order of names: name, NUL, dtype, NUL, shape ("[2,
// 3]"), NUL, and the 16 bytes of the tensor's own XXH3-128 in canonical (big-endian)
// form. So the digest depends on the stored bytes, and not on shards, file order or
// unused tensors.
//
// Threading: values.
#pragma once

#include <xxhash.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "server/model/safetensors.h"

namespace pbs {

// Hashes one tensor as its bytes are read.
class TensorHash {
 public:
  TensorHash();
  void Update(const void* data, int64_t bytes);
  std::array<uint8_t, 16> Finish() const;

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

class ModelDigest {
 public:
  explicit ModelDigest(std::string architecture)
      : architecture_(std::move(architecture)) {}

  void Add(const TensorInfo& tensor, const std::array<uint8_t, 16>& hash);
  // "xxh3-128:" and 32 hexadecimal digits.
  std::string Finish() const;

 private:
  const std::string architecture_;
  std::map<std::string, std::string> tensors_;  // name -> the bytes to hash after it
};

}  // namespace pbs
