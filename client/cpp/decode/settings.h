// Settings of pbs-decode, from its command line.
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
  absl::Duration timeout = absl::Hours(1);  // for the prefill and the fetch together
  std::string model;       // its name at the server; "" for the only model
  std::string model_path;  // folder of the same model on this machine

  // Exactly one is set: a prompt to prefill, or the ticket of a prefilled one.
  std::string tokens_path;
  std::string ticket_path;
  bool ignore_endpoint = false;      // of tickets: all calls go to `server`
  std::string shared_memory_socket;  // of a server on this host; "": over the network
  std::string then_tokens_path;  // tokens fed one by one after the prompt; "" for none

  v1::AttentionOptions attention;  // without a method: the profile
  std::string profile;             // of the model; "": the server's default profile
  bool checksums = true;
  bool keep_lease = false;

  int32_t max_new_tokens = 16;
  bool ignore_eos = false;
  std::optional<DType>
      kv_dtype;  // of the cache here; default: the model's compute dtype
  // The cache travels as F8_E4M3, with a scale for each page of `page_tokens` tokens.
  bool wire_fp8 = false;
  int32_t page_tokens = 16;
  RopeOptions rope;  // must equal the server's for the same folder
  CpuBackendOptions backend;

  std::string output_path;  // the decoded ids as a JSON list; "" for none
  bool json = false;        // one line of JSON on stdout instead of the table
  bool quiet = false;       // no progress
};

// A parsed command line. Without settings the program exits with `exit_code`: 0 after
// --help, 2 for a wrong command line, whose reason is on stderr.
struct ParsedFlags {
  std::optional<Settings> settings;
  int exit_code = 0;
};
ParsedFlags ParseFlags(int argc, char** argv);

}  // namespace pbs::decode
