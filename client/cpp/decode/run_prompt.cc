#include "client/cpp/decode/run_prompt.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/decode/cache_filler.h"
#include "client/cpp/decode/files.h"
#include "server/base/status.h"
#include "server/model/decode.h"
#include "server/model/sampling.h"

namespace pbs::decode {
namespace {

using server::ToAbsl;

constexpr absl::Duration kReleaseTimeout = absl::Seconds(5);

v1::DType WireDType(DType dtype) {
  return dtype == DType::kF32 ? v1::F32 : dtype == DType::kF16 ? v1::F16 : v1::BF16;
}

absl::Status CheckSameModel(const std::string& name, const std::string& digest,
                            const Model& model) {
  if (digest == model.digest()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "the server's model ", name, " has digest ", digest, ", the one here has ",
      model.digest(), ": their caches are not compatible; use the same model"));
}

// A cache at the server and the fetch that copies it here.
class Handoff {
 public:
  Handoff(const Settings& settings, client::Client& client, absl::Time deadline)
      : settings_(settings), client_(client), terms_{.deadline = deadline} {}
  ~Handoff() {
    if (fetched_.valid()) fetched_.wait();
    if (has_ticket_ && !settings_.keep_lease) {
      // Best effort: if the release fails, the lease expires.
      client_.Release(ticket_, {.deadline = absl::Now() + kReleaseTimeout})
          .IgnoreError();
    }
  }
  Handoff(const Handoff&) = delete;
  Handoff& operator=(const Handoff&) = delete;

  void Take(const v1::KvTicket& ticket) {
    ticket_ = ticket;
    has_ticket_ = true;
  }
  bool has_ticket() const { return has_ticket_; }
  const v1::KvTicket& ticket() const { return ticket_; }

  // Follows the prefill on a thread of its own. `filler` must outlive this.
  void Start(CacheFiller& filler, DType dtype) {
    v1::FetchRequest request;
    *request.mutable_ticket() = ticket_;
    const v1::DType stored = WireDType(dtype);
    request.set_dtype(settings_.wire_fp8 ? v1::F8_E4M3 : stored);
    if (settings_.wire_fp8) request.set_page_tokens(settings_.page_tokens);
    request.set_checksums(settings_.checksums);
    fetched_ = std::async(std::launch::async, [this, request, stored, &filler] {
      return client_.Fetch(request, filler, terms_, stored);
    });
  }
  absl::Status Wait() { return fetched_.get(); }

 private:
  const Settings& settings_;
  client::Client& client_;
  const client::CallTerms terms_;
  v1::KvTicket ticket_;
  bool has_ticket_ = false;
  std::future<absl::Status> fetched_;
};

class PromptRun {
 public:
  PromptRun(const Settings& settings, const Model& model, client::Client& client,
            Progress& progress)
      : settings_(settings),
        model_(model),
        client_(client),
        progress_(progress),
        deadline_(absl::Now() + settings.timeout),
        handoff_(settings, client, deadline_) {}

  absl::StatusOr<Outcome> Run() {
    if (!settings_.then_tokens_path.empty()) {
      PBS_ABSL_ASSIGN_OR_RETURN(then_tokens_, ReadTokens(settings_.then_tokens_path,
                                                         model_.config().vocab_size));
    }
    const absl::Status fetched =
        settings_.ticket_path.empty() ? PrefillAndFetch() : FetchHeld();
    progress_.Clear();
    PBS_ABSL_RETURN_IF_ERROR(fetched);
    PBS_ABSL_RETURN_IF_ERROR(Decode());
    outcome_.ticket = handoff_.ticket();
    return std::move(outcome_);
  }

 private:
  class Observer;

  absl::Status PrefillAndFetch();
  absl::Status FetchHeld();
  absl::Status FindFirstToken(const v1::KvTicket& ticket, v1::KvDescriptor kv);
  absl::Status FindModel();
  absl::Status MakeCache(int32_t num_tokens);
  absl::Status Decode();
  void ShowProgress();

  const Settings& settings_;
  const Model& model_;
  client::Client& client_;
  Progress& progress_;
  const absl::Time deadline_;
  Outcome outcome_;
  std::vector<int32_t> then_tokens_;
  std::optional<KvCache> cache_;
  std::unique_ptr<CacheFiller> filler_;
  std::atomic<int32_t> layers_done_ = 0, layers_here_ = 0;
  int32_t first_token_ = 0;  // after the prompt
  Handoff handoff_;          // last: its fetch writes into what is above
};

void PromptRun::ShowProgress() {
  const int32_t layers = model_.config().num_layers;
  progress_.Show(absl::StrCat("prefill ", Bar(layers_done_, layers), " layers, ",
                              layers_here_.load(), " fetched"));
}

absl::Status PromptRun::FindModel() {
  PBS_ABSL_ASSIGN_OR_RETURN(const v1::ListModelsResponse models,
                            client_.ListModels({.deadline = deadline_}));
  std::string names;
  for (const v1::ModelInfo& info : models.models()) {
    if (info.name() == settings_.model ||
        (settings_.model.empty() && models.models_size() == 1)) {
      outcome_.model = info.name();
      return CheckSameModel(info.name(), info.model_digest(), model_);
    }
    absl::StrAppend(&names, names.empty() ? "" : ", ", info.name());
  }
  return absl::NotFoundError(
      absl::StrCat("the server has no model \"", settings_.model, "\"; it serves ",
                   names.empty() ? "none" : names, "; say which with --model"));
}

absl::Status PromptRun::MakeCache(int32_t num_tokens) {
  // The last decoded token is never fed back, so the cache need not hold it.
  const int64_t wanted = int64_t{num_tokens} +
                         static_cast<int64_t>(then_tokens_.size()) +
                         settings_.max_new_tokens - 1;
  if (wanted > model_.config().max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        num_tokens, " prompt tokens, ", then_tokens_.size(),
        " after them and max_new_tokens ", settings_.max_new_tokens, " need ", wanted,
        " positions; the model has ", model_.config().max_tokens));
  }
  PBS_ABSL_ASSIGN_OR_RETURN(
      cache_, ToAbsl(KvCache::Create(model_.kv_shape(static_cast<int32_t>(wanted)),
                                     model_.backend())));
  filler_ = std::make_unique<CacheFiller>(*cache_, num_tokens, [this](int32_t layers) {
    layers_here_ = layers;
    ShowProgress();
  });
  outcome_.prompt_tokens = num_tokens;
  KvShape sent = cache_->shape();
  sent.capacity = num_tokens;
  outcome_.kv_bytes = sent.bytes();
  return absl::OkStatus();
}

// Opens the fetch as soon as there is a ticket.
class PromptRun::Observer final : public client::PrefillObserver {
 public:
  explicit Observer(PromptRun& run) : run_(run) {}
  void OnAdmitted(const v1::Admitted& admitted) override {
    run_.handoff_.Take(admitted.ticket());
    run_.handoff_.Start(*run_.filler_, run_.cache_->shape().dtype);
    run_.ShowProgress();
  }
  void OnLayer(const v1::LayerDone& layer) override {
    run_.layers_done_ = layer.index() + 1;
    run_.ShowProgress();
  }

 private:
  PromptRun& run_;
};

absl::Status PromptRun::PrefillAndFetch() {
  PBS_ABSL_ASSIGN_OR_RETURN(
      const std::vector<int32_t> prompt,
      ReadTokens(settings_.tokens_path, model_.config().vocab_size));
  PBS_ABSL_RETURN_IF_ERROR(FindModel());
  PBS_ABSL_RETURN_IF_ERROR(MakeCache(static_cast<int32_t>(prompt.size())));
  v1::PrefillRequest request;
  request.set_model(outcome_.model);
  request.mutable_token_ids()->Add(prompt.begin(), prompt.end());
  *request.mutable_attention() = settings_.attention;
  request.set_profile(settings_.profile);
  request.mutable_delivery()->mutable_lease();

  const absl::Time begin = absl::Now();
  Observer observer(*this);
  const absl::StatusOr<v1::Done> done =
      client_.Prefill(request, observer, nullptr, {.deadline = deadline_});
  const absl::Time prefilled = absl::Now();
  if (!done.ok()) return done.status();
  if (!handoff_.has_ticket()) {
    return absl::DataLossError("the server sent `done` without `admitted`");
  }
  PBS_ABSL_RETURN_IF_ERROR(handoff_.Wait());
  PBS_ABSL_RETURN_IF_ERROR(
      CheckSameModel(outcome_.model, done->ticket().model_digest(), model_));
  handoff_.Take(done->ticket());
  outcome_.prefill_seconds = absl::ToDoubleSeconds(prefilled - begin);
  outcome_.kv_tail_seconds = absl::ToDoubleSeconds(absl::Now() - prefilled);
  outcome_.prefill = done->stats();
  first_token_ = static_cast<int32_t>(done->first_token_id());
  return absl::OkStatus();
}

absl::Status PromptRun::FetchHeld() {
  PBS_ABSL_ASSIGN_OR_RETURN(const v1::KvTicket ticket,
                            ReadTicket(settings_.ticket_path));
  PBS_ABSL_ASSIGN_OR_RETURN(v1::KvDescriptor kv,
                            client_.Describe(ticket, {.deadline = deadline_}));
  PBS_ABSL_RETURN_IF_ERROR(
      CheckSameModel(kv.model(), kv.lease().ticket().model_digest(), model_));
  handoff_.Take(kv.lease().ticket());
  outcome_.model = kv.model();
  PBS_ABSL_RETURN_IF_ERROR(MakeCache(kv.num_tokens()));
  const absl::Time begin = absl::Now();
  handoff_.Start(*filler_, cache_->shape().dtype);
  PBS_ABSL_RETURN_IF_ERROR(handoff_.Wait());
  outcome_.kv_tail_seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  return FindFirstToken(ticket, std::move(kv));
}

// Asks the server only when the token is needed: the lease may have expired by now.
absl::Status PromptRun::FindFirstToken(const v1::KvTicket& ticket,
                                       v1::KvDescriptor kv) {
  constexpr absl::Duration kPause = absl::Milliseconds(20);
  if (!then_tokens_.empty()) return absl::OkStatus();  // they come in its place
  while (!kv.has_first_token_id()) {
    if (kv.state() == v1::COMPLETE) {
      return absl::DataLossError(
          "the fetched cache is complete, but has no first token");
    }
    PBS_ABSL_ASSIGN_OR_RETURN(kv, client_.Describe(ticket, {.deadline = deadline_}));
    // The last layer's keys come before its attention has run.
    if (!kv.has_first_token_id()) absl::SleepFor(kPause);
  }
  first_token_ = static_cast<int32_t>(kv.first_token_id());
  return absl::OkStatus();
}

absl::Status PromptRun::Decode() {
  cache_->set_num_tokens(outcome_.prompt_tokens);
  PBS_ABSL_ASSIGN_OR_RETURN(const auto decoder,
                            ToAbsl(Decoder::Create(model_, *cache_)));
  const std::vector<int32_t>& ends = model_.config().eos_token_ids;
  const absl::Time begin = absl::Now();
  int32_t next = first_token_;
  const auto feed = [&](int32_t token) -> absl::Status {
    PBS_ABSL_ASSIGN_OR_RETURN(const auto logits, ToAbsl(decoder->Step(token)));
    next = Argmax(logits);
    ++outcome_.decode_steps;
    return absl::OkStatus();
  };
  for (const int32_t token : then_tokens_) PBS_ABSL_RETURN_IF_ERROR(feed(token));
  std::vector<int32_t>& tokens = outcome_.tokens;
  tokens.push_back(next);
  while (static_cast<int32_t>(tokens.size()) < settings_.max_new_tokens) {
    if (!settings_.ignore_eos && std::ranges::find(ends, next) != ends.end()) break;
    PBS_ABSL_RETURN_IF_ERROR(feed(next));
    tokens.push_back(next);
    progress_.Show(absl::StrCat(
        "decode ", Bar(static_cast<int>(tokens.size()), settings_.max_new_tokens)));
  }
  progress_.Clear();
  outcome_.decode_seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Outcome> RunPrompt(const Settings& settings, const Model& model,
                                  client::Client& client, Progress& progress) {
  return PromptRun(settings, model, client, progress).Run();
}

}  // namespace pbs::decode
