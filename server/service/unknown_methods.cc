#include "server/service/unknown_methods.h"

#include <cstddef>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/service/call_record.h"

namespace pbs::server {
namespace {

constexpr size_t kNameShownMax = 64;  // bytes of a caller's text in a message

class UnknownCall final : public grpc::ServerGenericBidiReactor {
 public:
  UnknownCall(ServiceContext& service, const std::string& method)
      : open_(service.open_calls) {
    const CallRecord record(service.parts, Rpc::kUnknown);
    Finish(record.End(absl::UnimplementedError(absl::StrCat(
        "no method \"",
        absl::Utf8SafeCHexEscape(absl::string_view(method).substr(0, kNameShownMax)),
        "\"; this server has pbs.v1 and grpc.health.v1.Health"))));
  }
  void OnDone() override { delete this; }

 private:
  const OpenCalls::Call open_;
};

}  // namespace

grpc::ServerGenericBidiReactor* UnknownMethods::CreateReactor(
    grpc::GenericCallbackServerContext* context) {
  return new UnknownCall(service_, context->method());
}

}  // namespace pbs::server
