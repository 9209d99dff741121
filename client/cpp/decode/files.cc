#include "client/cpp/decode/files.h"

#include <cstdint>
#include <fstream>
#include <ios>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "pbs/limits.h"
#include "server/base/status.h"
#include "server/model/file.h"
#include "server/model/json.h"

namespace pbs::decode {
namespace {

using server::ToAbsl;

constexpr int64_t kTokensBytesMax = 64 << 20;
constexpr int64_t kTicketBytesMax = 1 << 16;

}  // namespace

absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& path,
                                                int32_t vocab_size) {
  PBS_ABSL_ASSIGN_OR_RETURN(const std::string text,
                            ToAbsl(ReadTextFile(path, kTokensBytesMax)));
  PBS_ABSL_ASSIGN_OR_RETURN(
      const nlohmann::json list,
      ToAbsl(ParseJson(text, path,
                       {.bytes_max = kTokensBytesMax, .values_max = kSeqLenMax + 2})));
  if (!list.is_array() || list.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": not a JSON list of at least one token id"));
  }
  std::vector<int32_t> tokens;
  tokens.reserve(list.size());
  for (const nlohmann::json& token : list) {
    if (!token.is_number_integer() || token < 0 || token >= vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": element ", tokens.size(), " is ", token.dump(),
                       "; a token id is a whole number below vocab_size ", vocab_size));
    }
    tokens.push_back(token.get<int32_t>());
  }
  return tokens;
}

absl::StatusOr<v1::KvTicket> ReadTicket(const std::string& path) {
  PBS_ABSL_ASSIGN_OR_RETURN(const std::string text,
                            ToAbsl(ReadTextFile(path, kTicketBytesMax)));
  PBS_ABSL_ASSIGN_OR_RETURN(
      const nlohmann::json root,
      ToAbsl(ParseJson(text, path, {.bytes_max = kTicketBytesMax})));
  if (!root.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  }
  const JsonObject object(root, path + ": ");
  PBS_ABSL_ASSIGN_OR_RETURN(const std::string handle, ToAbsl(object.String("handle")));
  PBS_ABSL_ASSIGN_OR_RETURN(const std::string epoch, ToAbsl(object.String("epoch")));
  PBS_ABSL_ASSIGN_OR_RETURN(const std::string model_digest,
                            ToAbsl(object.String("model_digest")));
  PBS_ABSL_ASSIGN_OR_RETURN(const std::string sparsity_digest,
                            ToAbsl(object.String("sparsity_digest")));
  std::string endpoint;
  if (root.contains("endpoint")) {
    PBS_ABSL_ASSIGN_OR_RETURN(endpoint, ToAbsl(object.String("endpoint")));
  }
  uint64_t epoch_number = 0;
  if (!absl::SimpleAtoi(epoch, &epoch_number)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": epoch ", Quoted(epoch),
                                                   " is not a decimal 64-bit number"));
  }
  v1::KvTicket ticket;
  ticket.set_handle(handle);
  ticket.set_epoch(epoch_number);
  ticket.set_model_digest(model_digest);
  ticket.set_sparsity_digest(sparsity_digest);
  ticket.set_endpoint(endpoint);
  return ticket;
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  if (!file) return absl::UnavailableError(absl::StrCat(path, ": cannot be written"));
  return absl::OkStatus();
}

}  // namespace pbs::decode
