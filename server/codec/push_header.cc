#include "server/codec/push_header.h"

#include <cstdint>

#include "proto/wire/messages.h"

namespace pbs::server {

grpc::ByteBuffer EncodePushHeader(const PushFacts& facts, const KvShape& shape,
                                  const KvFormat& format) {
  v1::KvChunk message;
  v1::KvPushHeader& header = *message.mutable_push_header();
  header.set_transfer_id(facts.transfer_id);
  header.set_request_id(facts.request_id);
  header.set_model(facts.model);
  header.set_model_digest(facts.model_digest);
  header.set_sparsity_digest(facts.sparsity_digest);
  header.set_prompt_digest(facts.prompt_digest);
  header.mutable_shape()->set_num_layers(shape.num_layers);
  header.mutable_shape()->set_num_kv_heads(shape.num_kv_heads);
  header.mutable_shape()->set_head_dim(shape.head_dim);
  header.mutable_shape()->set_dtype(EncodeDType(shape.dtype));
  header.set_num_tokens(shape.capacity);
  header.set_epoch(facts.epoch);
  header.set_dtype(format.WireDType(shape.dtype));
  header.set_layout(EncodeLayout(format.layout));
  header.set_page_tokens(format.page_tokens);
  header.set_checksums(format.checksums);
  header.set_bytes(static_cast<uint64_t>(facts.bytes));
  return wire::EncodeMessage(message);
}

}  // namespace pbs::server
