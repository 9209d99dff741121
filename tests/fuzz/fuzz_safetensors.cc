// Spec: server/model/safetensors.h and checkpoint.h. Whatever a weight file or a shard
// index says, the answer is tensors that tile the file, or InvalidArgument with a
// reason.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "server/model/checkpoint.h"
#include "server/model/safetensors.h"

namespace {

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_safetensors: %s\n", what);
  std::abort();
}

void RequireRefusal(const pbs::Status& status) {
  Require(status.code() == pbs::StatusCode::kInvalidArgument, "refuses with this code");
  Require(!status.message().empty(), "refuses without a reason");
}

void RequireTiling(const std::vector<pbs::TensorInfo>& tensors, int64_t data_begin,
                   int64_t file_bytes) {
  int64_t bytes = 0;
  for (const pbs::TensorInfo& tensor : tensors) {
    Require(tensor.begin >= data_begin, "a tensor begins in the header");
    Require(tensor.bytes >= 1 && tensor.bytes <= file_bytes - tensor.begin,
            "a tensor ends behind the file");
    for (int64_t size : tensor.shape) Require(size >= 1, "an empty dimension");
    bytes += tensor.bytes;
  }
  Require(bytes == file_bytes - data_begin, "tensors do not fill the file");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto file_bytes = static_cast<int64_t>(size);
  const auto length = pbs::ParseSafetensorsLength({data, size}, file_bytes);
  if (length.ok()) {
    const auto tensors = pbs::ParseSafetensorsHeader(
        text.substr(8, static_cast<size_t>(*length)), file_bytes);
    if (tensors.ok()) {
      RequireTiling(*tensors, 8 + *length, file_bytes);
    } else {
      RequireRefusal(tensors.status());
    }
  } else {
    RequireRefusal(length.status());
  }
  const auto index = pbs::ParseShardIndex(text);
  if (!index.ok()) {
    RequireRefusal(index.status());
    return 0;
  }
  for (const auto& [tensor, file] : *index) {
    Require(file.find('/') == std::string::npos && file[0] != '.',
            "a shard outside the folder");
  }
  return 0;
}
