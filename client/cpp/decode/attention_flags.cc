#include "client/cpp/decode/attention_flags.h"

#include <CLI/CLI.hpp>
#include <cstddef>
#include <string_view>
#include <type_traits>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"
#include "server/base/status.h"

namespace pbs::decode {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

constexpr char kGroup[] = "Attention (docs/PROTOCOL.md describes the options)";
constexpr Scope kScopes[] = {Scope::kKvHead, Scope::kQueryHead};

bool Is(const OptionTraits& option, std::string_view name) {
  return option.name == name;
}

bool IsOfPrefill(const OptionTraits& option) {
  return !Is(option, "use_given_order") && !Is(option, "use_given_lists");
}

bool HasField(const google::protobuf::Descriptor& message, const OptionTraits& option) {
  return message.FindFieldByName(option.name) != nullptr;
}

std::string Flag(const OptionTraits& option) {
  return absl::StrCat("--", absl::StrReplaceAll(option.name, {{"_", "-"}}));
}

// The methods that have the option: "a, b and c", where `word` is "and".
std::string Owners(const OptionTraits& option, const char* word) {
  std::string names = MethodsWith(option.bit);
  if (const size_t comma = names.rfind(", "); comma != std::string::npos) {
    names.replace(comma, 2, absl::StrCat(" ", word, " "));
  }
  if (HasField(*v1::Permutation::descriptor(), option)) {
    absl::StrAppend(&names, ", ", word, " others with --permute");
  }
  return names;
}

// "[0.9; prism 0.95]": the default, and that of methods with another.
std::string Defaults(const OptionTraits& option) {
  const auto text = [&](Method method) -> std::string {
    const AttentionOptions options = DefaultOptions(method);
    return std::visit(
        [&](auto field) -> std::string {
          const auto value = options.*field;
          if constexpr (std::is_same_v<decltype(value), const Scope>) {
            return ScopeName(value);
          } else if constexpr (std::is_same_v<decltype(value), const bool>) {
            return value ? "yes" : "no";
          } else {
            return absl::StrCat(value);
          }
        },
        option.field);
  };
  const std::string usual = text(AttentionOptions().method);
  std::string all = usual;
  for (Method method : kMethods) {
    if ((TraitsOf(method).options & option.bit) == 0 || text(method) == usual) continue;
    absl::StrAppend(&all, "; ", MethodName(method), " ", text(method));
  }
  return absl::StrCat("[", all, "]");
}

// The methods that have the option, short: "every method except dense".
std::string ShortOwners(const OptionTraits& option) {
  std::vector<const char*> others;
  for (Method method : kMethods) {
    if ((TraitsOf(method).options & option.bit) != 0) continue;
    others.push_back(MethodName(method));
  }
  if (others.empty()) return "every method";
  if (others.size() > 2) return Owners(option, "and");
  return absl::StrCat("every method except ", absl::StrJoin(others, " and "));
}

std::string Help(const OptionTraits& option) {
  std::string text = absl::StrCat(ShortOwners(option), ": ");
  if (option.low != option.high) {
    absl::StrAppendFormat(&text, "%s%.9g to %.9g ", option.low_excluded ? "above " : "",
                          option.low, option.high);
  }
  // Two defaults are those of a prefill.
  if (Is(option, "dense_fallback")) return text + "[yes]";
  if (Is(option, "dense_tail_blocks")) return text + "[with --method 2]";
  return text + Defaults(option);
}

void Set(Message& message, const FieldDescriptor& field, int32_t value) {
  message.GetReflection()->SetInt32(&message, &field, value);
}
void Set(Message& message, const FieldDescriptor& field, float value) {
  message.GetReflection()->SetFloat(&message, &field, value);
}
void Set(Message& message, const FieldDescriptor& field, bool value) {
  message.GetReflection()->SetBool(&message, &field, value);
}
void Set(Message& message, const FieldDescriptor& field, const std::string& name) {
  message.GetReflection()->SetEnum(
      &message, &field,
      field.enum_type()->FindValueByName(absl::AsciiStrToUpper(name)));
}

}  // namespace

void AttentionFlags::AddTo(CLI::App& app) {
  std::vector<std::string> names;
  for (Method method : kMethods) names.emplace_back(MethodName(method));
  app.add_option("--method", method_,
                 "attention of the prefill [the server's default profile]")
      ->check(CLI::IsMember(names))
      ->group(kGroup);
  for (const OptionTraits& option : AllOptions()) {
    if (IsOfPrefill(option)) AddOption(app, option);
  }
}

void AttentionFlags::AddOption(CLI::App& app, const OptionTraits& option) {
  const auto keep = [this, &option](const auto& value) {
    given_.push_back({&option, value});
  };
  const std::string flag = Flag(option), help = Help(option);
  const auto add = [&](auto field) -> CLI::Option* {
    using Value = std::decay_t<decltype(AttentionOptions().*field)>;
    if constexpr (std::is_same_v<Value, bool>) {
      if (Is(option, "permute")) {
        return app.add_flag_function(
            flag, [this, keep](int64_t) { keep(permute_ = true); }, help);
      }
      return app.add_flag_function(
          absl::StrCat(flag, ",!--no-", flag.substr(2)),
          [keep](int64_t count) { keep(count > 0); }, help);
    } else if constexpr (std::is_same_v<Value, Scope>) {
      std::vector<std::string> scopes;
      for (Scope scope : kScopes) scopes.emplace_back(ScopeName(scope));
      return app.add_option_function<std::string>(flag, keep, help)
          ->check(CLI::IsMember(scopes));
    } else if constexpr (std::is_same_v<Value, int32_t>) {
      return app.add_option_function<Value>(flag, keep, help)
          ->check(CLI::Range(INT32_MIN, INT32_MAX, "INT"));
    } else {
      return app.add_option_function<Value>(flag, keep, help);
    }
  };
  std::visit(add, option.field)->group(kGroup);
}

std::string AttentionFlags::FirstGiven() const {
  if (!method_.empty()) return "--method";
  return given_.empty() ? "" : Flag(*given_.front().option);
}

absl::Status AttentionFlags::Check(const Given& given) const {
  const OptionTraits& option = *given.option;
  const bool sorts = permute_ && HasField(*v1::Permutation::descriptor(), option);
  if (method_.empty()) {
    const bool of_profile = HasField(*v1::AttentionOptions::descriptor(), option) &&
                            !Is(option, "as_published");
    if (sorts || of_profile || Is(option, "permute")) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(Flag(option), " needs --method ", Owners(option, "or")));
  }
  OptionSet has = FindMethod(method_)->options;
  if (sorts && (has & FindOption("permute")->bit) != 0) has |= option.bit;
  if ((has & option.bit) != 0) return absl::OkStatus();
  std::string flag = Flag(option);
  if (const bool* on = std::get_if<bool>(&given.value)) {
    if (!*on) flag.insert(2, "no-");
  } else {
    const auto append = [&](const auto& value) { absl::StrAppend(&flag, " ", value); };
    std::visit(append, given.value);
  }
  return absl::InvalidArgumentError(absl::StrCat(flag, " is an option of ",
                                                 Owners(option, "and"), "; --method ",
                                                 method_, " does not have it"));
}

absl::StatusOr<v1::AttentionOptions> AttentionFlags::Message() const {
  v1::AttentionOptions wire;
  // An option is a field of the first of these messages that has it.
  std::vector<google::protobuf::Message*> messages;
  if (!method_.empty()) {
    messages.push_back(wire.GetReflection()->MutableMessage(
        &wire, wire.GetDescriptor()->FindFieldByName(method_)));
  }
  if (permute_) messages.push_back(wire.mutable_permutation());
  messages.push_back(&wire);
  for (const Given& given : given_) {
    PBS_ABSL_RETURN_IF_ERROR(Check(given));
    for (google::protobuf::Message* message : messages) {
      const FieldDescriptor* field =
          message->GetDescriptor()->FindFieldByName(given.option->name);
      if (field == nullptr) continue;
      std::visit([&](const auto& value) { Set(*message, *field, value); }, given.value);
      break;
    }
  }
  return wire;
}

}  // namespace pbs::decode
