#include "server/codec/attention_options.h"

#include <cstdint>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"
#include "pbs/check.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

absl::StatusOr<Scope> DecodeScope(int number) {
  switch (number) {
    case v1::SCOPE_UNSPECIFIED:
    case v1::KV_HEAD:
      return Scope::kKvHead;
    case v1::QUERY_HEAD:
      return Scope::kQueryHead;
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          "scope ", number, " is not one of KV_HEAD (", static_cast<int>(v1::KV_HEAD),
          "), QUERY_HEAD (", static_cast<int>(v1::QUERY_HEAD), ")"));
  }
}

int EncodeScope(Scope scope) {
  return scope == Scope::kKvHead ? v1::KV_HEAD : v1::QUERY_HEAD;
}

// The option of a field of the wire. They have the same names.
const OptionTraits& OptionOf(const FieldDescriptor& field) {
  const OptionTraits* option = FindOption(field.name());
  PBS_CHECK(option != nullptr);
  return *option;
}

absl::Status DecodeField(const Message& wire, const FieldDescriptor& field,
                         AttentionOptions& options) {
  const Reflection& reflection = *wire.GetReflection();
  return std::visit(
      [&](auto member) -> absl::Status {
        using Value = std::decay_t<decltype(options.*member)>;
        if constexpr (std::is_same_v<Value, int32_t>) {
          options.*member = reflection.GetInt32(wire, &field);
        } else if constexpr (std::is_same_v<Value, float>) {
          options.*member = reflection.GetFloat(wire, &field);
        } else if constexpr (std::is_same_v<Value, bool>) {
          options.*member = reflection.GetBool(wire, &field);
        } else {
          PBS_ABSL_ASSIGN_OR_RETURN(options.*member,
                                    DecodeScope(reflection.GetEnumValue(wire, &field)));
        }
        return absl::OkStatus();
      },
      OptionOf(field).field);
}

// The fields that are set and are options. Sub-messages are not.
absl::Status DecodeFields(const Message& wire, AttentionOptions& options) {
  std::vector<const FieldDescriptor*> fields;
  wire.GetReflection()->ListFields(wire, &fields);
  for (const FieldDescriptor* field : fields) {
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) continue;
    PBS_ABSL_RETURN_IF_ERROR(DecodeField(wire, *field, options));
  }
  return absl::OkStatus();
}

// Sets every field of `wire` that is an option.
void EncodeFields(const AttentionOptions& options, Message& wire) {
  const Reflection& reflection = *wire.GetReflection();
  for (int i = 0; i < wire.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor& field = *wire.GetDescriptor()->field(i);
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) continue;
    std::visit(
        [&](auto member) {
          const auto value = options.*member;
          using Value = std::decay_t<decltype(value)>;
          if constexpr (std::is_same_v<Value, int32_t>) {
            reflection.SetInt32(&wire, &field, value);
          } else if constexpr (std::is_same_v<Value, float>) {
            reflection.SetFloat(&wire, &field, value);
          } else if constexpr (std::is_same_v<Value, bool>) {
            reflection.SetBool(&wire, &field, value);
          } else {
            reflection.SetEnumValue(&wire, &field, EncodeScope(value));
          }
        },
        OptionOf(field).field);
  }
}

const FieldDescriptor* MethodField(const v1::AttentionOptions& wire) {
  return wire.GetReflection()->GetOneofFieldDescriptor(
      wire, wire.GetDescriptor()->FindOneofByName("method"));
}

// A message without a method changes the profile's options, one with a method the
// method's defaults.
absl::StatusOr<AttentionOptions> DecodeMethod(const v1::AttentionOptions& wire,
                                              const AttentionOptions& profile) {
  const FieldDescriptor* field = MethodField(wire);
  if (field == nullptr) {
    if (wire.as_published()) {
      return absl::InvalidArgumentError("as_published needs a method");
    }
    return profile;
  }
  const MethodTraits* traits = FindMethod(field->name());
  PBS_CHECK(traits != nullptr);
  AttentionOptions options = DefaultOptions(traits->method, wire.as_published());
  PBS_ABSL_RETURN_IF_ERROR(
      DecodeFields(wire.GetReflection()->GetMessage(wire, field), options));
  return options;
}

}  // namespace

std::vector<AttentionProfile> DefaultProfiles() {
  AttentionOptions best = DefaultOptions(Method::kXAttention);
  best.block_size = 64;
  best.window_blocks = 8;
  best.dense_tail_blocks = 3;
  best.mean_correction = true;
  AttentionOptions large_blocks = best;
  large_blocks.block_size = 128;
  large_blocks.window_blocks = 4;
  large_blocks.dense_tail_blocks = kPrefillTailBlocks;
  return {{best}, {large_blocks}};
}

AttentionProfile DefaultProfile() { return DefaultProfiles().front(); }

v1::AttentionOptions WithPrefillTail(v1::AttentionOptions wire) {
  const FieldDescriptor* field = MethodField(wire);
  const bool selects = field != nullptr && FindMethod(field->name())->Selects();
  if (selects && !wire.as_published() && !wire.has_dense_tail_blocks()) {
    wire.set_dense_tail_blocks(kPrefillTailBlocks);
  }
  return wire;
}

absl::StatusOr<AttentionOptions> DecodeAttentionOptions(
    const v1::AttentionOptions& wire, const AttentionProfile& profile,
    bool dense_fallback) {
  PBS_ABSL_ASSIGN_OR_RETURN(AttentionOptions options,
                            DecodeMethod(wire, profile.options));
  options.dense_fallback = dense_fallback;
  if (wire.method_case() == v1::AttentionOptions::METHOD_NOT_SET) {
    options.dense_fallback = profile.dense_fallback.value_or(dense_fallback);
  }
  if (wire.has_permutation()) {
    options.permute = true;
    PBS_ABSL_RETURN_IF_ERROR(DecodeFields(wire.permutation(), options));
  }
  PBS_ABSL_RETURN_IF_ERROR(DecodeFields(wire, options));
  return options;
}

absl::StatusOr<AttentionProfile> DecodeAttentionProfile(
    const v1::AttentionOptions& wire) {
  AttentionProfile profile;
  PBS_ABSL_ASSIGN_OR_RETURN(profile.options, DecodeAttentionOptions(wire, {}, false));
  profile.options.dense_fallback = false;
  if (wire.has_dense_fallback()) profile.dense_fallback = wire.dense_fallback();
  return profile;
}

v1::AttentionOptions EncodeAttentionOptions(const AttentionOptions& options) {
  v1::AttentionOptions wire;
  const FieldDescriptor* field =
      wire.GetDescriptor()->FindFieldByName(MethodName(options.method));
  EncodeFields(options, *wire.GetReflection()->MutableMessage(&wire, field));
  if (options.permute) EncodeFields(options, *wire.mutable_permutation());
  if (TraitsOf(options.method).Selects()) EncodeFields(options, wire);
  wire.set_dense_fallback(options.dense_fallback);
  wire.set_coverage_rows(options.coverage_rows);
  return wire;
}

v1::AttentionOptions EncodeAttentionProfile(const AttentionProfile& profile) {
  v1::AttentionOptions wire = EncodeAttentionOptions(profile.options);
  wire.clear_dense_fallback();
  if (profile.dense_fallback.has_value()) {
    wire.set_dense_fallback(*profile.dense_fallback);
  }
  return wire;
}

absl::StatusOr<std::vector<float>> DecodeHeadThresholds(
    const google::protobuf::RepeatedPtrField<v1::LayerThresholds>& layers,
    int32_t num_layers, int32_t num_heads) {
  if (!layers.empty() && layers.size() != num_layers) {
    return absl::InvalidArgumentError(absl::StrCat("layers has ", layers.size(),
                                                   " entries; the model has ",
                                                   num_layers, " layers"));
  }
  std::vector<float> thresholds;
  for (int layer = 0; layer < layers.size(); ++layer) {
    const auto& heads = layers[layer].thresholds();
    const std::string field = absl::StrCat("layers[", layer, "].thresholds");
    if (heads.size() != num_heads) {
      return absl::InvalidArgumentError(absl::StrCat(field, " has ", heads.size(),
                                                     " entries; the model has ",
                                                     num_heads, " query heads"));
    }
    for (int head = 0; head < heads.size(); ++head) {
      if (!(heads[head] > 0 && heads[head] <= 1)) {
        return absl::InvalidArgumentError(
            absl::StrCat(field, "[", head, "] ", heads[head], " is outside (0, 1]"));
      }
      thresholds.push_back(heads[head]);
    }
  }
  return thresholds;
}

bool SetsThreshold(const v1::AttentionOptions& wire) {
  const FieldDescriptor* method = MethodField(wire);
  const auto* field = method->message_type()->FindFieldByName("threshold");
  if (field == nullptr) return false;
  const Message& options = wire.GetReflection()->GetMessage(wire, method);
  return options.GetReflection()->HasField(options, field);
}

void ClearThreshold(v1::AttentionOptions& wire) {
  if (!SetsThreshold(wire)) return;
  Message& options = *wire.GetReflection()->MutableMessage(&wire, MethodField(wire));
  options.GetReflection()->ClearField(
      &options, options.GetDescriptor()->FindFieldByName("threshold"));
}

v1::Method EncodeMethod(Method method) {
  return static_cast<v1::Method>(static_cast<int>(method) + 1);
}

}  // namespace pbs::server
