// Finds the calls that ended before any code of ours saw them. gRPC refuses some by
// itself (a request that is longer than its limit, or compressed), and some callers
// leave while they send their request. gRPC does not tell of them, but it counts every
// call of a server (channelz): what it has begun and what has not reached us is
// missing.
//
// Threading: one thread at a time. Memory: fixed.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "absl/time/time.h"

namespace pbs::server {

// gRPC's number of the server that this process has started last; 0 when it has none.
int64_t NewestServer();
// Calls that have begun on a server; none when gRPC does not count them.
std::optional<int64_t> CallsBegun(int64_t server);

class UnreadCalls {
 public:
  // A request may be on its way. A call counts once it was missing in each of the last
  // kLooks looks, which is for half a minute.
  static constexpr absl::Duration kLookInterval = absl::Seconds(5);
  static constexpr int kLooks = 7;

  // `begun` calls have begun, `seen` of them reached us. Returns how many more are
  // unread than the looks before have found. Take `begun` before `seen`.
  int64_t Look(int64_t begun, int64_t seen);

 private:
  std::array<int64_t, kLooks> missing_ = {};  // in turn; 0 at first, so the least is
  int next_ = 0;
  int64_t found_ = 0;
};

}  // namespace pbs::server
