// pbs-bench transfer: how fast tensors go to a running pbs-prefilld and come back,
// beside raw TCP, protobuf messages and Arrow Flight in the same run.
//
// PBS_BENCH_COMMAND in the environment is what the report gives as its command: that of
// the script which started the server and chose its port.
//
// Exit status: 0 when everything was measured and right, 1 when it was not, 2 for a
// wrong command line.
#include <malloc.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "client/cpp/bench/options.h"
#include "client/cpp/bench/peers.h"
#include "client/cpp/bench/report.h"
#include "client/cpp/bench/session.h"

namespace pbs::bench {
namespace {

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;

struct Flags {
  BenchOptions options;
  std::string output;
};

void AddFlags(CLI::App& app, Flags& flags) {
  BenchOptions& o = flags.options;
  app.option_defaults()->take_last();
  app.add_option("--server", o.server, "host:port [127.0.0.1:50051]");
  app.add_option(
      "--server-pid", o.server_pid,
      "pid of the server on this machine, to measure its CPU time; 0 = unknown [0]");
  app.add_option("--model", o.model,
                 "model whose cache is fetched [the server's only model]");
  app.add_option("--direction", o.direction, "upload, download or both [both]")
      ->check(CLI::IsMember({"upload", "download", "both"}));
  app.add_option("--streams", o.streams, "numbers of parallel calls, a list [1,2]")
      ->delimiter(',')
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--checksums", o.checksums,
                 "checksums of downloads: on, off or both [both]")
      ->check(CLI::IsMember({"on", "off", "both"}));
  app.add_option("--peers", o.peers,
                 "what to compare with, a list of tcp, protobuf, flight; the last two "
                 "only in downloads; none: nothing [tcp]")
      ->delimiter(',')
      ->check(CLI::IsMember({"tcp", "protobuf", "flight", "none"}))
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--flight", o.flight,
                 "command of the Arrow Flight peer: a Python with pyarrow, and "
                 "client/cpp/bench/flight_peer.py");
  app.add_option("--mib", o.mib, "MiB of one transfer [256]");
  app.add_option("--rounds", o.rounds, "runs of each kind of transfer [15]");
  app.add_option("--chunk-bytes", o.chunk_bytes, "payload of a chunk [1048576]");
  app.add_option("--stream-window-bytes", o.stream_window_bytes,
                 "bytes that the server may send ahead per stream [4194304]");
  app.add_option("--shared-memory-socket", o.shared_memory_socket,
                 "also measure downloads from the shared memory of the server, which "
                 "has this shared_memory_socket [not measured]");
  app.add_option(
      "--output", flags.output,
      "file for the JSON; the table is then on stdout [JSON on stdout, table "
      "on stderr]");
}

// As pbs-prefilld does: by default glibc maps and unmaps each received chunk.
void TuneMalloc() {
  mallopt(M_MMAP_THRESHOLD, 8 << 20);
  mallopt(M_TRIM_THRESHOLD, 32 << 20);
}

// One line that overwrites itself, where a person watches.
void Say(const std::string& text) {
  if (isatty(STDERR_FILENO) == 0) return;
  std::fprintf(stderr, "\r%-60s%s", text.c_str(), text.empty() ? "\r" : "");
}

absl::Status Write(const nlohmann::ordered_json& report, const std::string& output) {
  const std::string text = absl::StrCat(report.dump(2), "\n");
  const std::string table = Table(report);
  std::FILE* file = output.empty() ? stdout : std::fopen(output.c_str(), "we");
  if (file == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("--output ", output, " cannot be written"));
  }
  bool written = std::fputs(text.c_str(), file) >= 0;
  written = (output.empty() ? std::fflush(file) : std::fclose(file)) == 0 && written;
  std::fputs(table.c_str(), output.empty() ? stderr : stdout);
  return written ? absl::OkStatus()
                 : absl::UnavailableError("the JSON could not be written whole");
}

std::string CommandOf(int argc, char** argv) {
  if (const char* given = std::getenv("PBS_BENCH_COMMAND"); given != nullptr) {
    return given;
  }
  std::string command = "pbs-bench";
  for (int i = 1; i < argc; ++i) absl::StrAppend(&command, " ", argv[i]);
  return command;
}

absl::Status Run(const Flags& flags, const std::string& command) {
  const auto peers = StartPeers(flags.options);  // before gRPC has threads
  if (!peers.ok()) return peers.status();
  const auto result = RunSession(flags.options, *peers, Say);
  Say("");
  if (!result.ok()) return result.status();
  return Write(Report(flags.options, command, *result), flags.output);
}

}  // namespace

int Main(int argc, char** argv) {
  CLI::App app("Measures a prefill node");
  app.require_subcommand(1);
  Flags flags;
  AddFlags(*app.add_subcommand(
               "transfer", "throughput of the data plane, compared with other ways"),
           flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  absl::Status status = Validate(flags.options);
  const int exit_status = status.ok() ? kExitFailed : kExitUsage;
  if (status.ok()) {
    TuneMalloc();
    std::signal(SIGPIPE, SIG_IGN);  // a peer that ended is an error of its transfer
    status = Run(flags, CommandOf(argc, argv));
  }
  if (status.ok()) return 0;
  std::fprintf(stderr, "pbs-bench: %s: %s\n",
               absl::StatusCodeToString(status.code()).c_str(),
               std::string(status.message()).c_str());
  return exit_status;
}

}  // namespace pbs::bench

int main(int argc, char** argv) { return pbs::bench::Main(argc, argv); }
