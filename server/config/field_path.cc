#include "server/config/field_path.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::EnumDescriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

absl::Status Bad(std::string message) {
  return absl::InvalidArgumentError(std::move(message));
}

std::string FieldNames(const Descriptor& type) {
  std::string names;
  for (int i = 0; i < type.field_count(); ++i) {
    absl::StrAppend(&names, i == 0 ? "" : ", ", type.field(i)->name());
  }
  return names;
}

std::string ValueNames(const EnumDescriptor& type) {
  std::string names;
  for (int i = 0; i < type.value_count(); ++i) {
    absl::StrAppend(&names, i == 0 ? "" : ", ", type.value(i)->name());
  }
  return names;
}

absl::Status NotA(absl::string_view value, absl::string_view what) {
  return Bad(absl::StrCat("\"", value, "\" is not ", what));
}

absl::Status SetBool(absl::string_view value, const FieldDescriptor* field,
                     Message& message) {
  if (value != "true" && value != "false") return NotA(value, "true or false");
  message.GetReflection()->SetBool(&message, field, value == "true");
  return absl::OkStatus();
}

absl::Status SetEnum(absl::string_view value, const FieldDescriptor* field,
                     Message& message) {
  const EnumDescriptor& type = *field->enum_type();
  const auto* named = type.FindValueByName(std::string(value));
  if (named == nullptr) {
    return NotA(value, absl::StrCat("one of ", ValueNames(type)));
  }
  message.GetReflection()->SetEnum(&message, field, named);
  return absl::OkStatus();
}

absl::Status SetJson(absl::string_view value, Message& target) {
  target.Clear();
  const auto status = google::protobuf::util::JsonStringToMessage(
      google::protobuf::StringPiece(value.data(), value.size()), &target);
  if (status.ok()) return absl::OkStatus();
  return Bad(absl::StrCat("not the JSON of ", target.GetDescriptor()->name(), ": ",
                          status.message().ToString()));
}

template <class T, class Setter>
absl::Status SetInteger(absl::string_view value, const char* type, Setter set) {
  T number = 0;
  if (!absl::SimpleAtoi(value, &number)) return NotA(value, type);
  set(number);
  return absl::OkStatus();
}

// Sets a field that is no list.
absl::Status SetLeaf(absl::string_view value, const FieldDescriptor* field,
                     Message& message) {
  const Reflection& fields = *message.GetReflection();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      fields.SetString(&message, field, std::string(value));
      return absl::OkStatus();
    case FieldDescriptor::CPPTYPE_BOOL:
      return SetBool(value, field, message);
    case FieldDescriptor::CPPTYPE_ENUM:
      return SetEnum(value, field, message);
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return SetJson(value, *fields.MutableMessage(&message, field));
    case FieldDescriptor::CPPTYPE_INT32:
      return SetInteger<int32_t>(value, "a 32-bit integer", [&](int32_t number) {
        fields.SetInt32(&message, field, number);
      });
    case FieldDescriptor::CPPTYPE_INT64:
      return SetInteger<int64_t>(value, "a 64-bit integer", [&](int64_t number) {
        fields.SetInt64(&message, field, number);
      });
    case FieldDescriptor::CPPTYPE_FLOAT: {
      float number = 0;
      if (!absl::SimpleAtof(value, &number)) return NotA(value, "a number");
      fields.SetFloat(&message, field, number);
      return absl::OkStatus();
    }
    case FieldDescriptor::CPPTYPE_DOUBLE: {
      double number = 0;
      if (!absl::SimpleAtod(value, &number)) return NotA(value, "a number");
      fields.SetDouble(&message, field, number);
      return absl::OkStatus();
    }
    default:
      return Bad(absl::StrCat("fields of type ", field->type_name(),
                              " cannot be set from the command line"));
  }
}

// The index that `part` names in a list; the list's size names the next element.
absl::StatusOr<int> Index(absl::string_view part, const FieldDescriptor* field,
                          const Message& message) {
  const int size = message.GetReflection()->FieldSize(message, field);
  uint32_t index = 0;
  if (!absl::SimpleAtoi(part, &index) || index > static_cast<uint32_t>(size)) {
    return Bad(absl::StrCat("index \"", part, "\" of ", field->name(),
                            " is not a number in [0, ", size, "]"));
  }
  return static_cast<int>(index);
}

// The element of a list of messages that `part` names, appended when it is the next.
absl::Status Element(absl::string_view part, const FieldDescriptor* field,
                     Message& message, Message** element) {
  const Reflection& fields = *message.GetReflection();
  PBS_ABSL_ASSIGN_OR_RETURN(const int index, Index(part, field, message));
  *element = index == fields.FieldSize(message, field)
                 ? fields.AddMessage(&message, field)
                 : fields.MutableRepeatedMessage(&message, field, index);
  return absl::OkStatus();
}

// As Element(), of a list of strings.
absl::Status SetText(absl::string_view part, absl::string_view value,
                     const FieldDescriptor* field, Message& message) {
  const Reflection& fields = *message.GetReflection();
  PBS_ABSL_ASSIGN_OR_RETURN(const int index, Index(part, field, message));
  if (index == fields.FieldSize(message, field)) {
    fields.AddString(&message, field, std::string(value));
  } else {
    fields.SetRepeatedString(&message, field, index, std::string(value));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SetField(absl::string_view path, absl::string_view value,
                      Message& message) {
  const std::vector<absl::string_view> parts = absl::StrSplit(path, '.');
  Message* current = &message;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Descriptor& type = *current->GetDescriptor();
    const FieldDescriptor* field = type.FindFieldByName(std::string(parts[i]));
    if (field == nullptr) {
      return Bad(absl::StrCat("no field \"", parts[i], "\" in ", type.name(),
                              "; it has ", FieldNames(type)));
    }
    const bool is_message = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
    if (field->is_repeated()) {
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING &&
          i + 2 == parts.size()) {
        return SetText(parts[i + 1], value, field, *current);
      }
      if (!is_message || i + 1 == parts.size()) {
        return Bad(absl::StrCat(field->name(), " is a list; name an element, as in ",
                                field->name(), ".0"));
      }
      if (absl::Status status = Element(parts[++i], field, *current, &current);
          !status.ok()) {
        return status;
      }
      if (i + 1 == parts.size()) return SetJson(value, *current);
      continue;
    }
    if (i + 1 == parts.size()) return SetLeaf(value, field, *current);
    if (!is_message) {
      return Bad(absl::StrCat(field->name(), " has no field \"", parts[i + 1], "\""));
    }
    current = current->GetReflection()->MutableMessage(current, field);
  }
  return Bad("the path names no field");
}

}  // namespace pbs::server
