#include "server/service/service_context.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "pbs/check.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

constexpr size_t kMetadataEntryBytes = 32;  // as HTTP/2 counts an entry's overhead
constexpr size_t kNameShownMax = 64;        // bytes of a caller's text in a message

}  // namespace

absl::Status ServiceContext::CheckMetadata(
    const grpc::CallbackServerContext& call) const {
  size_t bytes = 0;
  for (const auto& [name, value] : call.client_metadata()) {
    bytes += name.size() + value.size() + kMetadataEntryBytes;
  }
  const auto limit = static_cast<size_t>(options.transport.metadata_bytes_max);
  if (bytes <= limit) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "metadata of ", bytes, " bytes exceeds transport.metadata_bytes_max ", limit,
      "; send fewer or shorter entries"));
}

absl::Status ServiceContext::CheckReady(const grpc::CallbackServerContext& call) const {
  PBS_ABSL_RETURN_IF_ERROR(CheckMetadata(call));
  if (models_.load() != nullptr) return absl::OkStatus();
  return WithRetryAfter(absl::UnavailableError("loading models"), kRetryAfterDefault);
}

absl::Status ServiceContext::CheckAdmitting(
    const grpc::CallbackServerContext& call) const {
  if (absl::Status ready = CheckReady(call); !ready.ok()) {
    if (absl::IsUnavailable(ready)) {
      parts.metrics.engine.Rejected(RejectReason::kLoading).Increment();
    }
    return ready;
  }
  if (!draining_) return absl::OkStatus();
  parts.metrics.engine.Rejected(RejectReason::kDraining).Increment();
  return Uploads::Draining();
}

absl::StatusOr<Uploads::Slot> ServiceContext::TakeUploadSlot(Uploads::End end) {
  absl::StatusOr<Uploads::Slot> slot = uploads.Take(std::move(end));
  if (!slot.ok()) {
    const bool draining = absl::IsUnavailable(slot.status());
    parts.metrics.engine
        .Rejected(draining ? RejectReason::kDraining : RejectReason::kUploads)
        .Increment();
  }
  return slot;
}

absl::Status ServiceContext::WhyCut(const CallDeadline& deadline) const {
  if (stopping_) return absl::UnavailableError("the server is shutting down");
  if (deadline.Ends(parts.clock.Now())) {
    return absl::DeadlineExceededError("the deadline passed before the call was done");
  }
  return absl::CancelledError("the caller went away");
}

CallDeadline ServiceContext::DeadlineOf(
    const grpc::CallbackServerContext& context) const {
  return {parts.clock.Now(), parts.clock.FromSystem(context.deadline())};
}

absl::StatusOr<ByteReservation> ServiceContext::Reserve(int64_t bytes) {
  absl::StatusOr<ByteReservation> reservation = parts.ledger.Reserve(bytes);
  if (!reservation.ok()) {
    const bool never = absl::IsInvalidArgument(reservation.status());
    parts.metrics.engine
        .Rejected(never ? RejectReason::kTooLarge : RejectReason::kMemory)
        .Increment();
  }
  return reservation;
}

absl::StatusOr<const ServedModel*> ServiceContext::FindModel(
    const std::string& name) const {
  const auto& list = models();
  if (name.empty() && list.size() == 1) return list[0];
  for (const ServedModel* model : list) {
    if (model->name == name) return model;
  }
  const std::string names =
      absl::StrJoin(list, ", ", [](std::string* out, const ServedModel* model) {
        absl::StrAppend(out, "\"", model->name, "\"");
      });
  if (list.empty())
    return absl::NotFoundError("this server has no model: attention only");
  if (name.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("model is empty, but this server has ", list.size(), ": ", names));
  }
  return absl::NotFoundError(absl::StrCat(
      "no model \"",
      absl::Utf8SafeCHexEscape(absl::string_view(name).substr(0, kNameShownMax)),
      "\"; this server has ", names));
}

void ServiceContext::Drain(absl::AnyInvocable<void()> on_uploaded) {
  draining_ = true;
  const int32_t sent_home = uploads.Drain(std::move(on_uploaded));
  parts.metrics.engine.Rejected(RejectReason::kDraining).Increment(sent_home);
}

void ServiceContext::SetModels(std::vector<const ServedModel*> models) {
  PBS_CHECK(models_.load() == nullptr);
  model_list_ = std::move(models);
  models_.store(&model_list_);
}

}  // namespace pbs::server
