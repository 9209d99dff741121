// The first message of a push: what a sink must know of the cache that comes.
//
// Threading: stateless.
#pragma once

#include <cstdint>
#include <string>

#include <grpcpp/support/byte_buffer.h>

#include "pbs/v1/kv.pb.h"
#include "server/codec/kv_format.h"
#include "server/model/kv_cache.h"

namespace pbs::server {

// Facts of the cache beside shape and format.
struct PushFacts {
  std::string transfer_id = {};  // 32 hex digits
  std::string request_id = {};
  std::string model = {};
  std::string model_digest = {};
  std::string sparsity_digest = {};
  std::string prompt_digest = {};
  uint64_t epoch = 0;
  int64_t bytes = 0;  // of all payloads
};

// `shape` is that of the held cache, whose capacity is the length of its prompt;
// `format` is that of the chunks.
grpc::ByteBuffer EncodePushHeader(const PushFacts& facts, const KvShape& shape,
                                  const KvFormat& format);

}  // namespace pbs::server
