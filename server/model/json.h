// Strict JSON for model files, which may come from any source.
//
// Size, nesting and number of values are bounded. A repeated key is an error, because
// two readers that keep different copies would read different models. null counts as
// absent, as in published configs.
//
// Threading: values. Memory: O(text). Errors: InvalidArgument that names the document,
// the key, and what was expected.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "pbs/status.h"

namespace pbs {

struct JsonLimits {
  int64_t bytes_max = 1 << 20;
  int32_t depth_max = 16;       // nested arrays and objects
  int64_t values_max = 65'536;  // all values; keys do not count
};

// `what` names the document in errors: "config.json".
StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view what,
                                   const JsonLimits& limits);

// Typed access to the members of an object. Borrows the object.
class JsonObject {
 public:
  // Requires object.is_object(). `where` starts every error: "config.json: ".
  JsonObject(const nlohmann::json& object, std::string where)
      : object_(&object), where_(std::move(where)) {}

  bool Has(std::string_view key) const { return Find(key) != nullptr; }
  // The member, or null when it is absent or null.
  const nlohmann::json* Find(std::string_view key) const;

  // Bounds are inclusive. Without a fallback an absent key is an error.
  StatusOr<int64_t> Int(std::string_view key, int64_t low, int64_t high) const;
  StatusOr<int64_t> IntOr(std::string_view key, int64_t fallback, int64_t low,
                          int64_t high) const;
  StatusOr<double> Number(std::string_view key, double low, double high) const;
  StatusOr<double> NumberOr(std::string_view key, double fallback, double low,
                            double high) const;
  StatusOr<bool> BoolOr(std::string_view key, bool fallback) const;
  StatusOr<std::string> String(std::string_view key) const;
  StatusOr<JsonObject> Object(std::string_view key) const;
  // The member must be an array. The caller checks its elements.
  StatusOr<const nlohmann::json*> Array(std::string_view key) const;

  const nlohmann::json& json() const { return *object_; }
  // InvalidArgument whose message begins with `where`.
  Status Error(std::string_view message) const;

 private:
  Status Missing(std::string_view key) const;
  Status WrongType(std::string_view key, const nlohmann::json& value,
                   const char* expected) const;

  const nlohmann::json* object_;
  std::string where_;
};

// `text` in quotes for an error message: cut at 64 bytes, control characters replaced.
std::string Quoted(std::string_view text);
// The shortest text with at most 6 digits: 0.1, 500000, 1e-05.
std::string NumberText(double value);

}  // namespace pbs
