// Spec: server/base/log.h.
#include "server/base/log.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

constexpr char kPrefix[] =
    R"({"time":"2026-01-31T12:00:00.000250Z","level":"info","event":)";

std::string Line(std::string_view event, std::initializer_list<LogField> fields) {
  const absl::Time time =
      absl::FromUnixSeconds(1'769'860'800) + absl::Microseconds(250);
  return FormatLogLine(time, LogLevel::kInfo, event, fields);
}

TEST(LogLine, StartsWithTimeLevelAndEvent) {
  EXPECT_EQ(Line("serving", {}), std::string(kPrefix) + R"("serving"})");
}

TEST(LogLine, WritesEachTypeAsItsJsonType) {
  EXPECT_EQ(Line("done", {{"rpc", "prefill"},
                          {"tokens", 8192},
                          {"seconds", 0.25},
                          {"ok", true},
                          {"bytes", int64_t{1} << 40},
                          {"epoch", std::numeric_limits<uint64_t>::max()}}),
            std::string(kPrefix) +
                R"("done","rpc":"prefill","tokens":8192,"seconds":0.25,"ok":true,)" +
                R"("bytes":1099511627776,"epoch":18446744073709551615})");
}

TEST(LogLine, NumbersThatJsonLacksBecomeNull) {
  EXPECT_EQ(Line("x", {{"a", std::nan("")}, {"b", -HUGE_VAL}}),
            std::string(kPrefix) + R"("x","a":null,"b":null})");
}

struct TextCase {
  const char* name;
  std::string text;
  std::string json;
};

class LogTextSpec : public testing::TestWithParam<TextCase> {};

TEST_P(LogTextSpec, CannotLeaveItsString) {
  EXPECT_EQ(Line("x", {{"t", GetParam().text}}),
            std::string(kPrefix) + R"("x","t":)" + GetParam().json + "}");
}

INSTANTIATE_TEST_SUITE_P(
    Texts, LogTextSpec,
    testing::Values(
        TextCase{"empty", "", R"("")"}, TextCase{"quote", R"(a"b)", R"("a\"b")"},
        TextCase{"backslash", R"(a\b)", R"("a\\b")"},
        TextCase{"newline", "a\nb", R"("a\nb")"},
        TextCase{"forged_line", "x\"}\n{\"event\":\"y", R"("x\"}\n{\"event\":\"y")"},
        TextCase{"control", std::string("a\0\x1b[31m\x7f", 8),
                 R"("a\u0000\u001b[31m\u007f")"},
        TextCase{"utf8", "\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x99\x82",
                 "\"\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x99\x82\""},
        TextCase{"lone_continuation", "a\x80z", "\"a\xEF\xBF\xBDz\""},
        TextCase{"cut_character", "a\xE2\x82", "\"a\xEF\xBF\xBD\xEF\xBF\xBD\""},
        TextCase{"overlong", "\xC0\xAF", "\"\xEF\xBF\xBD\xEF\xBF\xBD\""},
        TextCase{"surrogate", "\xED\xA0\x80",
                 "\"\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\""}),
    testing_support::CaseName());

TEST(Log, WritesOneLinePerEvent) {
  std::ostringstream out;
  {
    Log log(LogLevel::kInfo, out);
    log.Info("one", {{"n", 1}});
    log.Error("two");
  }
  const std::string text = out.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2);
  EXPECT_NE(text.find(R"("level":"info","event":"one","n":1})"), std::string::npos);
  EXPECT_NE(text.find(R"("level":"error","event":"two"})"), std::string::npos);
}

TEST(Log, DropsWhatIsBelowItsLevel) {
  std::ostringstream out;
  {
    Log log(LogLevel::kWarning, out);
    log.Debug("a");
    log.Info("b");
    log.Warning("c");
  }
  EXPECT_EQ(out.str().find("\"a\""), std::string::npos);
  EXPECT_EQ(out.str().find("\"b\""), std::string::npos);
  EXPECT_NE(out.str().find("\"c\""), std::string::npos);
}

}  // namespace
}  // namespace pbs::server
