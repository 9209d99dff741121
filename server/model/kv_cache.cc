#include "server/model/kv_cache.h"

#include <cstdint>
#include <string>
#include <utility>

#include "pbs/check.h"

namespace pbs {

int64_t KvShape::plane_bytes() const {
  return int64_t{num_kv_heads} * capacity * head_dim * DTypeBytes(dtype);
}

namespace {

Status CheckCapacity(const KvShape& shape) {
  if (shape.capacity < 1 || shape.capacity > kSeqLenMax) {
    return InvalidArgument("capacity " + std::to_string(shape.capacity) +
                           " of the KV cache is outside [1, " +
                           std::to_string(kSeqLenMax) + "]");
  }
  return OkStatus();
}

}  // namespace

StatusOr<KvCache> KvCache::Create(const KvShape& shape, Backend& backend) {
  return CreateWindow(shape, shape.num_layers, backend);
}

StatusOr<KvCache> KvCache::CreateOnHost(const KvShape& shape, Backend& backend) {
  PBS_RETURN_IF_ERROR(CheckCapacity(shape));
  PBS_ASSIGN_OR_RETURN(Buffer buffer, backend.AllocateHost(shape.bytes()));
  return KvCache(shape, shape.num_layers, std::move(buffer));
}

StatusOr<KvCache> KvCache::CreateIn(const KvShape& shape, Buffer memory) {
  PBS_RETURN_IF_ERROR(CheckCapacity(shape));
  PBS_CHECK(memory.bytes() == shape.bytes());
  return KvCache(shape, shape.num_layers, std::move(memory));
}

StatusOr<KvCache> KvCache::CreateWindow(const KvShape& shape, int32_t resident_layers,
                                        Backend& backend) {
  PBS_RETURN_IF_ERROR(CheckCapacity(shape));
  PBS_CHECK(resident_layers >= 1 && resident_layers <= shape.num_layers);
  PBS_ASSIGN_OR_RETURN(Buffer buffer,
                       backend.Allocate(2 * shape.plane_bytes() * resident_layers));
  return KvCache(shape, resident_layers, std::move(buffer));
}

void KvCache::set_num_tokens(int32_t num_tokens) {
  PBS_CHECK(num_tokens >= 0 && num_tokens <= shape_.capacity);
  num_tokens_ = num_tokens;
}

void* KvCache::Plane(int64_t index) const {
  return static_cast<char*>(buffer_.data()) + index * shape_.plane_bytes();
}

}  // namespace pbs
