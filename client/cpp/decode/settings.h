// What pbs-decode was asked to do: its command line.
//
// Threading: values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "pbs/cpu_backend.h"
#include "pbs/dtype.h"
#include "pbs/v1/types.pb.h"
#include "server/model/rope_config.h"

namespace pbs::decode {

struct Settings {
  std::string server = "127.0.0.1:50051";
  absl::Duration timeout = absl::Hours(1);  // of the prefill and of the fetch
  std::string model;       // as the server names it; "" for its only one
  std::string model_path;  // the same model here

  // One of the two: a prompt to prefill, or the ticket of one that was.
  std::string tokens_path;
  std::string ticket_path;
  std::string then_tokens_path;  // fed one by one behind the prompt; "" for none

  v1::AttentionOptions attention;  // no method: the server's profile
  bool checksums = true;
  bool keep_lease = false;

  int32_t max_new_tokens = 16;
  bool ignore_eos = false;
  std::optional<DType>
      kv_dtype;      // of the cache here; default: the model's compute dtype
  RopeOptions rope;  // as the server reads the same folder
  CpuBackendOptions backend;

  std::string output_path;  // the decoded ids as a JSON list; "" for none
  bool json = false;        // one line of JSON on stdout instead of the table
  bool quiet = false;       // no progress
};

// Parses the command line; nothing to do but exit with `exit_code` when there are no
// settings (--help: 0, a wrong command line: 2, with the reason on stderr).
struct ParsedFlags {
  std::optional<Settings> settings;
  int exit_code = 0;
};
ParsedFlags ParseFlags(int argc, char** argv);

}  // namespace pbs::decode
