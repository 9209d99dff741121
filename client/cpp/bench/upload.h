// Uploads: Attention.Attend with long keys and values and almost no attention.
//
// Each stream's call is a packed batch of two sequences: the first has all keys but one
// and no query, so nothing is computed over it; the second has the last key and one
// query, whose output must be that key's value to the bit. The server does everything
// else of a call: reservation, assembly in place, the scan for NaN and infinity, the
// reply. VerifyUpload() checks once, untimed, that the bytes are right.
//
// Threading: as Transfer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "client/cpp/bench/transfer.h"
#include "client/cpp/client.h"

namespace pbs::bench {

using Clients = std::vector<std::unique_ptr<client::Client>>;

// Finite floats in [-1, 1), from a fixed seed.
void FillUpload(std::span<std::byte> bytes);

// The keys and values that stream `stream` of `streams` sends: a part of `memory`.
std::span<const std::byte> UploadPart(std::span<const std::byte> memory,
                                      int32_t streams, int32_t stream);

// Stream i of the transfer calls clients[i]. `memory` and clients must outlive it.
std::unique_ptr<Transfer> MakeUpload(const Clients& clients,
                                     std::span<const std::byte> memory, int32_t streams,
                                     int32_t chunk_bytes);

// Attends with one query per head to every key of `part` and compares the output with
// one computed here: no chunk may be missing, doubled or out of place. DataLoss if so.
absl::Status VerifyUpload(client::Client& client, std::span<const std::byte> part,
                          int32_t chunk_bytes);

}  // namespace pbs::bench
