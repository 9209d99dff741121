// Results of raw attention beside its output.
//
// Threading: a value.
#pragma once

namespace pbs::server {

struct AttendWanted {
  bool lse = false, order = false, lists = false;
};

}  // namespace pbs::server
