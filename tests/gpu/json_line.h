// One JSON object on one line, field by field.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace pbs::gpu {

class JsonLine {
 public:
  JsonLine& Text(const char* name, const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    return Raw(name, quoted + '"');
  }
  JsonLine& Bool(const char* name, bool value) {
    return Raw(name, value ? "true" : "false");
  }
  JsonLine& Integer(const char* name, int64_t value) {
    return Raw(name, std::to_string(value));
  }
  // Numbers that JSON cannot hold become null.
  JsonLine& Number(const char* name, double value) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.4g", value);
    return Raw(name, std::isfinite(value) ? text : "null");
  }
  JsonLine& Integers(const char* name, const std::vector<int64_t>& values) {
    std::string list;
    for (const int64_t value : values) {
      list.append(list.empty() ? "" : ", ").append(std::to_string(value));
    }
    return Raw(name, "[" + list + "]");
  }
  JsonLine& Object(const char* name, const JsonLine& line) {
    return Raw(name, line.ToString());
  }

  std::string ToString() const { return "{" + fields_ + "}"; }
  // Flushes at once, because the next step may end the program.
  void Print(std::FILE* out = stdout) const {
    std::fprintf(out, "%s\n", ToString().c_str());
    std::fflush(out);
  }

 private:
  JsonLine& Raw(const char* name, const std::string& value) {
    fields_.append(fields_.empty() ? "\"" : ", \"").append(name).append("\": ");
    fields_.append(value);
    return *this;
  }

  std::string fields_;
};

}  // namespace pbs::gpu
