// The attention flags of pbs-decode: one for each option of pbs/attention_options.h
// that a prefill has, and the message that they make. An option has the same name in
// the tables there, in the protocol and, with hyphens, as a flag. So a method or an
// option that the tables and the protocol have needs nothing here.
//
// Threading: single-threaded. Memory: small strings.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pbs/attention_options.h"
#include "pbs/v1/types.pb.h"

namespace CLI {
class App;
}

namespace pbs::decode {

class AttentionFlags {
 public:
  // Adds --method, --permute and the flags of the options. The object must stay where
  // it is until `app` has parsed the command line.
  void AddTo(CLI::App& app);

  // A flag that was given, such as "--method"; "" when none was.
  std::string FirstGiven() const;

  // The options that were given. InvalidArgument names an option that the method does
  // not have, or that needs a method, and the methods that have it. The server checks
  // the values.
  absl::StatusOr<v1::AttentionOptions> Message() const;

 private:
  struct Given {
    const OptionTraits* option = nullptr;
    std::variant<int32_t, float, bool, std::string>
        value;  // a string is an enum's name
  };
  void AddOption(CLI::App& app, const OptionTraits& option);
  // Whether the method, or the server's profile, has the option.
  absl::Status Check(const Given& given) const;

  std::string method_;  // "": the server's default profile
  bool permute_ = false;
  std::vector<Given> given_;
};

}  // namespace pbs::decode
