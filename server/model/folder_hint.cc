#include "server/model/folder_hint.h"

#include <algorithm>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace pbs {
namespace {

namespace fs = std::filesystem;

struct Hint {
  std::string_view prefix;  // of a file's name
  std::string_view suffix;
  const char* text;  // behind the file's name
};

constexpr const char* kConvert =
    " is another format; convert it with transformers: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)";
constexpr const char* kOriginal =
    " is the maker's own format; serve the Hugging Face folder of this model";

// The first hint that fits a file is used.
constexpr Hint kHints[] = {
    {"adapter_config", ".json",
     " is of a LoRA adapter; merge it into its base model (merge_and_unload, "
     "save_pretrained) and serve that folder"},
    {"", ".gguf", " is a GGUF file, which is not read; serve the safetensors folder"},
    {"pytorch_model", ".bin", kConvert},
    {"pytorch_model.bin", ".index.json", kConvert},
    {"tf_model", ".h5", kConvert},
    {"flax_model", ".msgpack", kConvert},
    {"consolidated", "", kOriginal},
    {"params", ".json", kOriginal},
    {"", ".pth", kOriginal},
    {"snapshots", "",
     " is of a hub cache; name the folder in it that is called by a revision"},
    {"", ".safetensors", " is not read under this name"},
};

}  // namespace

std::string FolderHint(const std::string& folder) {
  std::error_code error;
  const fs::file_status status = fs::status(folder, error);
  if (status.type() == fs::file_type::not_found) return ": there is no such folder";
  if (status.type() != fs::file_type::directory) {
    return ": it is no folder; a model is a folder with config.json and safetensors";
  }
  std::vector<std::string> names;
  for (fs::directory_iterator entry(folder, error), end;
       !error && entry != end && names.size() < kHintEntriesMax;
       entry.increment(error)) {
    names.push_back(entry->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  for (const Hint& hint : kHints) {
    for (const std::string& name : names) {
      if (name.starts_with(hint.prefix) && name.ends_with(hint.suffix)) {
        return ": " + name + hint.text;
      }
    }
  }
  return "";
}

}  // namespace pbs
