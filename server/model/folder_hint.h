// What a folder is that is no model folder, and what to do with it.
#pragma once

#include <string>

namespace pbs {

// At most this many entries of a folder are looked at.
inline constexpr int kHintEntriesMax = 4096;

// To follow a refusal for a missing file: "" when there is nothing to tell, or
// ": it is a LoRA adapter (adapter_config.json); ...". Never fails.
std::string FolderHint(const std::string& folder);

}  // namespace pbs
