// KvStream: the flow of chunks out of a held cache. It waits for layers, makes chunks,
// holds their buffers, records the transfer, and ends with the prefill or the lease.
// Every delivery has one: inline, Fetch, push.
//
//   Open() -> Next() ... done() -> Complete() | Fail() -> Close()
//
// Threading: one thread at a time; `wake` is called from any. Memory: two chunks, which
// the caller has charged.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/wire/messages.h"
#include "server/engine/byte_ledger.h"
#include "server/engine/held_kv.h"
#include "server/service/kv_wait.h"
#include "server/service/service_context.h"
#include "server/service/transfer_record.h"
#include "server/transfer/kv_exporter.h"

namespace pbs::server {

class KvStream {
 public:
  // `wake` is called when Next() has something after it had nothing. It must not block
  // or call back.
  KvStream(const ServiceContext& service, std::function<void()> wake)
      : transfer_(service), wait_(std::move(wake)) {}

  // What a stream of this content holds beside the cache.
  static int64_t BufferBytes(const KvShape& shape, const KvRange& range,
                             const KvFormat& format,
                             KvContent content = KvContent::kKeysAndValues);

  // `exporter` is of `kv`; `buffers` are BufferBytes().
  void Open(std::shared_ptr<HeldKv> kv, std::unique_ptr<KvExporter> exporter,
            ByteReservation buffers);
  bool is_open() const { return exporter_ != nullptr; }
  // Every chunk was made.
  bool done() const { return exporter_->done(); }

  // The next chunk; nullopt when its layer is not ready: `wake` follows. An error is
  // final: why the cache cannot be read any more, as HeldKv::readable(). Not after
  // done().
  absl::StatusOr<std::optional<wire::KvChunk>> Next();

  // True when `wake` will not be called any more; false when it is about to be.
  bool LetGo() { return wait_.Stop(); }

  // Records that the last chunk was sent. Returns the seconds since the first.
  double Complete() { return transfer_.Complete(); }
  // Records that the call ended with `status`.
  void Fail(const absl::Status& status) { transfer_.Fail(status); }
  void Fail(TransferFailure reason) { transfer_.Fail(reason); }
  // Bytes of the sent content in the cache.
  int64_t held_bytes() const { return exporter_->held_bytes(); }
  // Frees everything. LetGo() was true.
  void Close();

 private:
  TransferRecord transfer_;
  std::shared_ptr<HeldKv> kv_;
  std::unique_ptr<KvExporter> exporter_;
  ByteReservation buffers_;
  KvWait wait_;
};

}  // namespace pbs::server
