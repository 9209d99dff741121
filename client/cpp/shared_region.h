// The shared memory of held caches, as a client on the server's host sees it.
//
// MapRegion() asks the server's Unix socket for the memory of one ticket and maps it
// for reading. The server takes the memory away when the lease ends: it then reads
// zeros, and no access faults. So a reader must check what it has copied: by checksum,
// or by asking for the lease afterwards.
//
// Threading: values and a stateless function; SharedRegions from any thread. Memory: a
// mapping takes address space. It keeps memory in use only when the server has died
// before the lease ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "pbs/v1/kv.pb.h"

namespace pbs::client {

class MappedRegion {
 public:
  explicit MappedRegion(std::span<const std::byte> bytes) : bytes_(bytes) {}
  ~MappedRegion();
  MappedRegion(const MappedRegion&) = delete;
  MappedRegion& operator=(const MappedRegion&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  const std::span<const std::byte> bytes_;
};

// Maps the memory of the cache of `ticket`, which has `bytes` bytes. Waits at most
// `timeout`.
//
// Errors: Unavailable, which names the path, when nobody answers at `socket_path`;
// NotFound when the server there has no lease with the ticket; DataLoss when what comes
// is not a sealed region of `bytes` bytes.
absl::StatusOr<std::shared_ptr<const MappedRegion>> MapRegion(
    const std::string& socket_path, const v1::KvTicket& ticket, int64_t bytes,
    absl::Duration timeout);

// The regions of the tickets that were used last. To map a region and to touch its
// pages takes a third of the time of copying it.
class SharedRegions {
 public:
  static constexpr size_t kRegionsMax = 4;

  explicit SharedRegions(std::string socket_path)
      : socket_path_(std::move(socket_path)) {}

  const std::string& socket_path() const { return socket_path_; }
  // As MapRegion().
  absl::StatusOr<std::shared_ptr<const MappedRegion>> Get(const v1::KvTicket& ticket,
                                                          int64_t bytes,
                                                          absl::Duration timeout);
  // Lets go of a region whose lease has ended.
  void Drop(const v1::KvTicket& ticket);

 private:
  struct Entry {
    std::string handle;
    uint64_t epoch = 0;
    std::shared_ptr<const MappedRegion> region;  // null: not mapped
  };
  // Takes the ticket's entry out.
  Entry Take(const v1::KvTicket& ticket) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string socket_path_;
  absl::Mutex mutex_;
  std::list<Entry> entries_ ABSL_GUARDED_BY(mutex_);  // the last used first
};

}  // namespace pbs::client
