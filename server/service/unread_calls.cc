#include "server/service/unread_calls.h"

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpc/grpc.h>
#include <grpc/support/alloc.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/numbers.h"

namespace pbs::server {
namespace {

using google::protobuf::Struct;
using google::protobuf::Value;

// A member of a JSON object; an empty value when it is not there.
const Value& Member(const Struct& object, const char* name) {
  const auto found = object.fields().find(std::string(name));
  return found == object.fields().end() ? Value::default_instance() : found->second;
}

// 64-bit numbers are strings in protobuf's JSON; 0 is left out.
int64_t Number(const Value& value) {
  int64_t number = 0;
  return absl::SimpleAtoi(value.string_value(), &number) ? number : 0;
}

// Frees `text`. An empty object when it is none.
Struct Parsed(char* text) {
  Struct object;
  if (text == nullptr) return object;
  if (!google::protobuf::util::JsonStringToMessage(text, &object).ok()) object.Clear();
  gpr_free(text);
  return object;
}

}  // namespace

int64_t NewestServer() {
  int64_t newest = 0;
  int64_t last = -1;
  while (newest > last) {  // a page at a time
    last = newest;
    const Struct page = Parsed(grpc_channelz_get_servers(newest + 1));
    for (const Value& server : Member(page, "server").list_value().values()) {
      const Struct& ref = Member(server.struct_value(), "ref").struct_value();
      newest = std::max(newest, Number(Member(ref, "serverId")));
    }
  }
  return newest;
}

std::optional<int64_t> CallsBegun(int64_t server) {
  const Struct answer = Parsed(grpc_channelz_get_server(server));
  const Value& found = Member(answer, "server");
  if (!found.has_struct_value()) return std::nullopt;
  const Struct& data = Member(found.struct_value(), "data").struct_value();
  return Number(Member(data, "callsStarted"));
}

int64_t UnreadCalls::Look(int64_t begun, int64_t seen) {
  missing_[static_cast<size_t>(next_)] = begun - seen;
  next_ = (next_ + 1) % kLooks;
  const int64_t unread = *std::min_element(missing_.begin(), missing_.end());
  const int64_t more = std::max<int64_t>(unread - found_, 0);
  found_ += more;
  return more;
}

}  // namespace pbs::server
