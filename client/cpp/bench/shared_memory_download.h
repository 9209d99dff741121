// Downloads from the server's shared memory: as download.h, on the server's host. Bytes
// are copied, and with checksums each copy is checked.
//
// Threading: as Transfer.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "client/cpp/bench/download.h"
#include "client/cpp/bench/options.h"
#include "client/cpp/bench/transfer.h"

namespace pbs::bench {

// How much of the mapping is timed.
enum class Mapping : uint8_t {
  kNew,   // "shm copy": mapped and touched for the first time, as by a decode tier
  kKept,  // "shm copy kept": the client has mapped it before
};

// Connects clients of its own, and before each run of kNew new ones. `options` and
// `source` must outlive the transfer. InvalidArgument as MakeDownload().
absl::StatusOr<std::unique_ptr<Transfer>> MakeSharedMemoryDownload(
    const BenchOptions& options, const DownloadSource& source, int32_t streams,
    bool checksums, Mapping mapping);

// "shm view": the bytes are checked where they lie, in a mapping that is kept, and
// copied nowhere: for consumers that use them there. Else as above.
absl::StatusOr<std::unique_ptr<Transfer>> MakeSharedMemoryView(
    const BenchOptions& options, const DownloadSource& source, int32_t streams);

}  // namespace pbs::bench
