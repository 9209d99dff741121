#include "server/base/json_text.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pbs::server {
namespace {

// Bytes of the valid UTF-8 character at the front of `text`; 0 when there is none.
size_t ValidCharacter(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return 1;
  size_t size = 0;
  uint32_t code = 0;
  uint32_t code_min = 0;
  if ((lead & 0xE0u) == 0xC0u) {
    size = 2, code = lead & 0x1Fu, code_min = 0x80;
  } else if ((lead & 0xF0u) == 0xE0u) {
    size = 3, code = lead & 0x0Fu, code_min = 0x800;
  } else if ((lead & 0xF8u) == 0xF0u) {
    size = 4, code = lead & 0x07u, code_min = 0x10000;
  }
  if (size == 0 || text.size() < size) return 0;
  for (size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0u) != 0x80u) return 0;
    code = (code << 6) | (byte(i) & 0x3Fu);
  }
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  return code < code_min || code > 0x10FFFF || surrogate ? 0 : size;
}

void AppendAscii(char c, std::string& out) {
  constexpr char kHex[] = "0123456789abcdef";
  switch (c) {
    case '"':
      out += "\\\"";
      return;
    case '\\':
      out += "\\\\";
      return;
    case '\n':
      out += "\\n";
      return;
    case '\t':
      out += "\\t";
      return;
    default:
      break;
  }
  if (static_cast<uint8_t>(c) < 0x20 || c == 0x7F) {
    out += "\\u00";
    out += kHex[static_cast<uint8_t>(c) >> 4];
    out += kHex[static_cast<uint8_t>(c) & 0xF];
    return;
  }
  out += c;
}

}  // namespace

void AppendJsonString(std::string_view text, std::string& out) {
  out += '"';
  while (!text.empty()) {
    const size_t size = ValidCharacter(text);
    if (size == 1) {
      AppendAscii(text.front(), out);
    } else if (size == 0) {
      out += "\xEF\xBF\xBD";
    } else {
      out += text.substr(0, size);
    }
    text.remove_prefix(size == 0 ? 1 : size);
  }
  out += '"';
}

}  // namespace pbs::server
