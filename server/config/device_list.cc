#include "server/config/device_list.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace pbs::server {

absl::StatusOr<std::vector<int32_t>> ParseDevices(const std::string& text) {
  std::vector<int32_t> devices;
  if (text.empty() || text == "all") return devices;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    int32_t device = 0;
    if (!absl::SimpleAtoi(part, &device) || device < 0 || device >= kDevicesMax) {
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", text, "\" holds \"", part,
          "\"; it is all, or a list of numbers in [0, ", kDevicesMax - 1, "], as 0,2"));
    }
    if (std::find(devices.begin(), devices.end(), device) != devices.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", text, "\" holds ", device, " twice"));
    }
    devices.push_back(device);
  }
  return devices;
}

}  // namespace pbs::server
