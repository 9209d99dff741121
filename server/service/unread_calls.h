// Counts calls that ended before our code received them. gRPC refuses some by itself
// (requests that exceed its limit or are compressed), and some callers leave while they
// send their request. gRPC does not report these, but it counts every call of a server
// (channelz). The difference between that count and the calls that reached us is the
// number of missing calls.
//
// Threading: one thread at a time. Memory: fixed.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "absl/time/time.h"

namespace pbs::server {

// gRPC's id of the server that this process started last; 0 when there is none.
int64_t NewestServer();
// Number of calls that have begun on a server; nullopt when gRPC does not count them.
std::optional<int64_t> CallsBegun(int64_t server);

class UnreadCalls {
 public:
  // A missing call may still be receiving its request. So it counts only after it was
  // missing in each of the last kLooks looks, which is half a minute.
  static constexpr absl::Duration kLookInterval = absl::Seconds(5);
  static constexpr int kLooks = 7;

  // `begun` calls have begun, and `seen` of them reached us. Returns the number of
  // unread calls that earlier looks have not returned. Read `begun` before `seen`.
  int64_t Look(int64_t begun, int64_t seen);

 private:
  std::array<int64_t, kLooks> missing_ = {};  // in turn; 0 at first, so the least is
  int next_ = 0;
  int64_t found_ = 0;
};

}  // namespace pbs::server
