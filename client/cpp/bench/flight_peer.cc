#include "client/cpp/bench/flight_peer.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace pbs::bench {
namespace {

absl::Status Tell(LineProcess& client, const std::string& line) {
  const absl::StatusOr<std::string> answer = client.Ask(line);
  if (!answer.ok()) return answer.status();
  if (*answer == "ok") return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("the Flight peer: ", *answer));
}

class Download final : public Transfer {
 public:
  Download(LineProcess& client, int64_t bytes, int32_t streams)
      : Transfer({.direction = "download", .peer = "flight", .streams = streams}),
        client_(client),
        bytes_(bytes) {}

  int64_t bytes() const override { return bytes_; }
  pid_t client_pid() const override { return client_.pid(); }

  // The program has the threads of all streams.
  absl::Status Run(int32_t stream) override {
    if (stream > 0) return absl::OkStatus();
    return Tell(client_, absl::StrCat("run ", label().streams));
  }

 private:
  LineProcess& client_;
  const int64_t bytes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<FlightPeer>> FlightPeer::Start(
    const std::string& command) {
  auto client = LineProcess::Start(absl::StrSplit(command, ' ', absl::SkipEmpty()));
  if (!client.ok()) return client.status();
  const absl::StatusOr<std::string> first = (*client)->ReadLine();
  int32_t server = 0;
  if (!first.ok() || !absl::SimpleAtoi(*first, &server) || server < 1) {
    return absl::UnavailableError(absl::StrCat(
        "--flight \"", command, "\" did not print the pid of its server; it needs a ",
        "Python with pyarrow and the file flight_peer.py"));
  }
  return std::unique_ptr<FlightPeer>(new FlightPeer(*std::move(client), server));
}

absl::StatusOr<std::unique_ptr<Transfer>> FlightPeer::MakeDownload(
    int64_t bytes, int32_t streams, int32_t chunk_bytes) {
  absl::Status made = Tell(*client_, absl::StrCat("prepare ", bytes, " ", chunk_bytes));
  if (!made.ok()) return made;
  return std::make_unique<Download>(*client_, bytes, streams);
}

}  // namespace pbs::bench
