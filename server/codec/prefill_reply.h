// Converts a PrefillResult to the messages of a PrefillEvent stream.
//
// Threading: stateless.
#pragma once

#include <cstdint>
#include <string>

#include <grpcpp/support/byte_buffer.h>

#include "pbs/v1/prefill.pb.h"
#include "server/codec/backend_facts.h"
#include "server/codec/prefill_request.h"
#include "server/engine/engine.h"

namespace pbs::server {

// Facts of the reply beside the result.
struct PrefillFacts {
  int32_t prompt_tokens = 0;
  std::string model_digest;
  std::string sparsity_digest;
  double send_seconds = 0;    // inline, push: seconds that the chunks took
  int64_t planned_bytes = 0;  // charged to the ledger
};

// Encodes `done` except ticket and expiry, which the lease store fills in.
v1::Done EncodeDone(const PrefillSpec& spec, const PrefillResult& result,
                    const PrefillFacts& facts, const BackendFacts& backend);

// Upper bound of the bytes of a result and its encoded form. It is charged before the
// work is admitted.
int64_t PrefillResultBytes(const PrefillSpec& spec, int32_t vocab_size,
                           int32_t num_layers);

// `shape` is that of the cache, `epoch` that of its chunks. No `ticket` without a
// lease.
grpc::ByteBuffer EncodeAdmitted(const v1::KvTicket* ticket, const Admission& admission,
                                const KvShape& shape, uint64_t epoch);
grpc::ByteBuffer EncodeLayerDone(int32_t layer, double density, double seconds);
grpc::ByteBuffer EncodeDoneEvent(const v1::Done& done);

}  // namespace pbs::server
