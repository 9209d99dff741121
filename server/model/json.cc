#include "server/model/json.h"

#include <cstdint>
#include <cstdio>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pbs {
namespace {

// First pass: bounds and repeated keys. Stops the parser at the first violation.
class Checker : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Checker(const JsonLimits& limits) : limits_(limits) {}

  const std::string& problem() const { return problem_; }

  bool null() override { return Value(); }
  bool boolean(bool) override { return Value(); }
  bool number_integer(number_integer_t) override { return Value(); }
  bool number_unsigned(number_unsigned_t) override { return Value(); }
  bool number_float(number_float_t, const string_t&) override { return Value(); }
  bool string(string_t&) override { return Value(); }
  bool binary(binary_t&) override { return Value(); }
  bool start_array(std::size_t) override { return Value() && Enter(); }
  bool end_array() override { return Leave(); }
  bool start_object(std::size_t) override { return Value() && Enter(); }
  bool end_object() override { return Leave(); }
  bool key(string_t& key) override {
    if (keys_.back().insert(key).second) return true;
    return Refuse("key " + Quoted(key) + " appears twice");
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return Refuse("is not valid JSON near byte " + std::to_string(position));
  }

 private:
  bool Value() {
    if (++values_ <= limits_.values_max) return true;
    return Refuse("has more than " + std::to_string(limits_.values_max) + " values");
  }
  bool Enter() {
    keys_.emplace_back();
    if (static_cast<int64_t>(keys_.size()) <= limits_.depth_max) return true;
    return Refuse("is nested deeper than " + std::to_string(limits_.depth_max));
  }
  bool Leave() {
    keys_.pop_back();
    return true;
  }
  bool Refuse(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }

  const JsonLimits limits_;
  int64_t values_ = 0;
  std::vector<std::set<std::string>> keys_;  // of the open arrays and objects
  std::string problem_;
};

Status OutsideRange(const JsonObject& object, std::string_view key,
                    const std::string& value, const std::string& low,
                    const std::string& high) {
  return object.Error(std::string(key) + " " + value + " is outside [" + low + ", " +
                      high + "]");
}

}  // namespace

std::string Quoted(std::string_view text) {
  constexpr size_t kLengthMax = 64;
  std::string quoted = "\"";
  for (char c : text.substr(0, kLengthMax)) {
    quoted += static_cast<unsigned char>(c) < 0x20 || c == 0x7F ? '?' : c;
  }
  return quoted + (text.size() > kLengthMax ? "...\"" : "\"");
}

std::string NumberText(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view what,
                                   const JsonLimits& limits) {
  const std::string where = std::string(what) + ": ";
  if (static_cast<int64_t>(text.size()) > limits.bytes_max) {
    return InvalidArgument(where + std::to_string(text.size()) +
                           " bytes of JSON exceed " + std::to_string(limits.bytes_max));
  }
  // The parser takes a NUL for the end and would not look at what is behind it.
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    return InvalidArgument(where + "is not valid JSON near byte " +
                           std::to_string(nul + 1));
  }
  Checker checker(limits);
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &checker)) {
    return InvalidArgument(where + checker.problem());
  }
  auto parsed = nlohmann::json::parse(text.begin(), text.end(), nullptr,
                                      /*allow_exceptions=*/false);
  PBS_CHECK(!parsed.is_discarded());
  return parsed;
}

const nlohmann::json* JsonObject::Find(std::string_view key) const {
  const auto found = object_->find(std::string(key));
  return found == object_->end() || found->is_null() ? nullptr : &*found;
}

Status JsonObject::Error(std::string_view message) const {
  return InvalidArgument(where_ + std::string(message));
}

Status JsonObject::Missing(std::string_view key) const {
  return Error(std::string(key) + " is missing");
}

Status JsonObject::WrongType(std::string_view key, const nlohmann::json& value,
                             const char* expected) const {
  return Error(std::string(key) + " is of type " + value.type_name() + ", not " +
               expected);
}

StatusOr<int64_t> JsonObject::Int(std::string_view key, int64_t low,
                                  int64_t high) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return Missing(key);
  if (!value->is_number_integer()) return WrongType(key, *value, "an integer");
  const bool too_large =
      value->is_number_unsigned() && value->get<uint64_t>() > uint64_t{INT64_MAX};
  const int64_t number = too_large ? 0 : value->get<int64_t>();
  if (too_large || number < low || number > high) {
    return OutsideRange(*this, key, value->dump(), std::to_string(low),
                        std::to_string(high));
  }
  return number;
}

StatusOr<int64_t> JsonObject::IntOr(std::string_view key, int64_t fallback, int64_t low,
                                    int64_t high) const {
  if (!Has(key)) return fallback;
  return Int(key, low, high);
}

StatusOr<double> JsonObject::Number(std::string_view key, double low,
                                    double high) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return Missing(key);
  if (!value->is_number()) return WrongType(key, *value, "a number");
  const double number = value->get<double>();
  if (!(number >= low && number <= high)) {
    return OutsideRange(*this, key, NumberText(number), NumberText(low),
                        NumberText(high));
  }
  return number;
}

StatusOr<double> JsonObject::NumberOr(std::string_view key, double fallback, double low,
                                      double high) const {
  if (!Has(key)) return fallback;
  return Number(key, low, high);
}

StatusOr<bool> JsonObject::BoolOr(std::string_view key, bool fallback) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return WrongType(key, *value, "a boolean");
  return value->get<bool>();
}

StatusOr<std::string> JsonObject::String(std::string_view key) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return Missing(key);
  if (!value->is_string()) return WrongType(key, *value, "a string");
  return *value->get_ptr<const std::string*>();
}

StatusOr<JsonObject> JsonObject::Object(std::string_view key) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return Missing(key);
  if (!value->is_object()) return WrongType(key, *value, "an object");
  return JsonObject(*value, where_ + std::string(key) + ": ");
}

StatusOr<const nlohmann::json*> JsonObject::Array(std::string_view key) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return Missing(key);
  if (!value->is_array()) return WrongType(key, *value, "an array");
  return value;
}

}  // namespace pbs
