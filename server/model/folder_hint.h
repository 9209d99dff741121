// Advice about a folder that is not a model folder.
#pragma once

#include <string>

namespace pbs {

// The most entries of a folder that are examined.
inline constexpr int kHintEntriesMax = 4096;

// Text to append to an error about a missing file: ": it is a LoRA adapter
// (adapter_config.json); ...", or "" when there is no advice. Never fails.
std::string FolderHint(const std::string& folder);

}  // namespace pbs
