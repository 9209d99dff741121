#include "server/model/checkpoint.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/model/folder_hint.h"
#include "server/model/json.h"

namespace pbs {
namespace {

constexpr std::string_view kSingleName = "model.safetensors";
constexpr std::string_view kIndexName = "model.safetensors.index.json";
constexpr std::string_view kSuffix = ".safetensors";
constexpr size_t kFileNameBytesMax = 255;

bool IsPlainName(const std::string& name) {
  return name.size() > kSuffix.size() && name.size() <= kFileNameBytesMax &&
         name.ends_with(kSuffix) && name[0] != '.' &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

Status InFile(const std::string& name, const Status& status) {
  return Status(status.code(), name + ": " + status.message());
}

StatusOr<std::vector<TensorInfo>> ReadHeader(const File& file) {
  uint8_t first8[8] = {};
  const int64_t available = std::min<int64_t>(file.size(), sizeof(first8));
  PBS_RETURN_IF_ERROR(file.ReadAt(0, available, first8));
  PBS_ASSIGN_OR_RETURN(const int64_t length,
                       ParseSafetensorsLength(first8, file.size()));
  std::string header(static_cast<size_t>(length), '\0');
  PBS_RETURN_IF_ERROR(file.ReadAt(sizeof(first8), length, header.data()));
  return ParseSafetensorsHeader(header, file.size());
}

// The name that a tensor of a model with more parts has in the language model alone;
// empty for one of another part. Writers put the language model under
// "language_model." or, later, under "model.language_model.", or leave it as it is.
std::string NameInTextPart(const std::string& name) {
  constexpr std::string_view kOuter = "language_model.";
  constexpr std::string_view kInner = "model.language_model.";
  if (name.starts_with(kOuter)) return name.substr(kOuter.size());
  if (name.starts_with(kInner)) return "model." + name.substr(kInner.size());
  for (std::string_view part :
       {"lm_head.", "model.layers.", "model.embed_tokens.", "model.norm."}) {
    if (name.starts_with(part)) return name;
  }
  return "";
}

}  // namespace

StatusOr<std::map<std::string, std::string>> ParseShardIndex(std::string_view text) {
  const JsonLimits limits = {.bytes_max = kIndexBytesMax,
                             .depth_max = 8,
                             .values_max = 2 * kCheckpointTensorsMax};
  PBS_ASSIGN_OR_RETURN(const nlohmann::json root, ParseJson(text, kIndexName, limits));
  const std::string where = std::string(kIndexName) + ": ";
  if (!root.is_object()) return InvalidArgument(where + "is not an object");
  PBS_ASSIGN_OR_RETURN(const JsonObject weight_map,
                       JsonObject(root, where).Object("weight_map"));
  if (weight_map.json().empty()) return weight_map.Error("has no tensors");
  const auto count = static_cast<int64_t>(weight_map.json().size());
  if (count > kCheckpointTensorsMax) {
    return weight_map.Error("has " + std::to_string(count) + " tensors, more than " +
                            std::to_string(kCheckpointTensorsMax));
  }
  std::map<std::string, std::string> index;
  std::set<std::string> shards;
  for (const auto& [tensor, value] : weight_map.json().items()) {
    const auto* name = value.get_ptr<const std::string*>();
    if (name == nullptr || !IsPlainName(*name)) {
      return weight_map.Error("tensor " + Quoted(tensor) + " is in " +
                              Quoted(name == nullptr ? value.type_name() : *name) +
                              ", which is not a plain *.safetensors file name");
    }
    shards.insert(*name);
    index.emplace(tensor, *name);
  }
  if (static_cast<int64_t>(shards.size()) > kShardsMax) {
    return weight_map.Error("names " + std::to_string(shards.size()) +
                            " shards, more than " + std::to_string(kShardsMax));
  }
  return index;
}

Status Checkpoint::AddShard(const std::string& folder, const std::string& name,
                            const std::map<std::string, std::string>* index) {
  PBS_ASSIGN_OR_RETURN(File file, File::Open(folder + "/" + name));
  StatusOr<std::vector<TensorInfo>> tensors = ReadHeader(file);
  if (!tensors.ok()) return InFile(file.path(), tensors.status());
  for (TensorInfo& tensor : *tensors) {
    if (index != nullptr) {
      const std::string where = file.path() + ": tensor " + Quoted(tensor.name);
      const auto entry = index->find(tensor.name);
      if (entry == index->end()) {
        return InvalidArgument(where + " is not in the index");
      }
      if (entry->second != name) {
        return InvalidArgument(where + " is in " + Quoted(entry->second) +
                               " by the index");
      }
    }
    file_of_.emplace(tensor.name, files_.size());
    tensors_.push_back(std::move(tensor));
  }
  files_.push_back(std::move(file));
  return OkStatus();
}

StatusOr<Checkpoint> Checkpoint::Open(const std::string& folder) {
  Checkpoint checkpoint;
  const std::string single(kSingleName);
  const auto has_single = File::Open(folder + "/" + single);
  const auto index_text =
      ReadTextFile(folder + "/" + std::string(kIndexName), kIndexBytesMax);
  if (has_single.status().code() != StatusCode::kNotFound) {
    PBS_RETURN_IF_ERROR(checkpoint.AddShard(folder, single, nullptr));
    if (index_text.status().code() != StatusCode::kNotFound) {
      checkpoint.notes_.push_back(std::string(kIndexName) + " is not read: " + single +
                                  " is");
    }
    return checkpoint;
  }
  if (!index_text.ok()) {
    if (index_text.status().code() != StatusCode::kNotFound) return index_text.status();
    return NotFound(folder + " has neither " + single + " nor " +
                    std::string(kIndexName) + FolderHint(folder));
  }
  PBS_ASSIGN_OR_RETURN(const auto index, ParseShardIndex(*index_text));
  PBS_RETURN_IF_ERROR(checkpoint.AddShards(folder, index));
  return checkpoint;
}

Status Checkpoint::AddShards(const std::string& folder,
                             const std::map<std::string, std::string>& index) {
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : index) shards.insert(shard);
  for (const std::string& shard : shards) {
    PBS_RETURN_IF_ERROR(AddShard(folder, shard, &index));
  }
  SortTensors();
  for (const auto& [tensor, shard] : index) {
    if (Find(tensor) == nullptr) promised_.emplace(tensor, shard);
  }
  if (!promised_.empty()) {
    notes_.push_back(
        std::string(kIndexName) + " names " + std::to_string(promised_.size()) +
        " tensors that no shard has; the first is " + Quoted(promised_.begin()->first) +
        " in " + Quoted(promised_.begin()->second));
  }
  return OkStatus();
}

Status Checkpoint::KeepTextPart() {
  std::vector<TensorInfo> kept;
  std::map<std::string, size_t, std::less<>> file_of;
  size_t num_others = 0;
  for (TensorInfo& tensor : tensors_) {
    const std::string name = NameInTextPart(tensor.name);
    if (name.empty()) {
      ++num_others;
      continue;
    }
    if (!file_of.emplace(name, file_of_.at(tensor.name)).second) {
      return InvalidArgument("two tensors are " + Quoted(name) +
                             " of the text part; one is " + Quoted(tensor.name));
    }
    tensor.name = name;
    kept.push_back(std::move(tensor));
  }
  tensors_ = std::move(kept);
  file_of_ = std::move(file_of);
  SortTensors();
  notes_.push_back("config.json: only its text_config is served; " +
                   std::to_string(num_others) + " tensors of other parts are not read");
  return OkStatus();
}

void Checkpoint::SortTensors() {
  std::sort(tensors_.begin(), tensors_.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.name < b.name; });
}

std::string Checkpoint::PromisedIn(const std::string& tensor) const {
  const auto found = promised_.find(tensor);
  return found == promised_.end() ? "" : found->second;
}

const TensorInfo* Checkpoint::Find(std::string_view name) const {
  const auto found =
      std::lower_bound(tensors_.begin(), tensors_.end(), name,
                       [](const TensorInfo& tensor, std::string_view wanted) {
                         return tensor.name < wanted;
                       });
  return found == tensors_.end() || found->name != name ? nullptr : &*found;
}

Status Checkpoint::Read(const TensorInfo& tensor, int64_t offset, int64_t bytes,
                        void* target) const {
  const auto file = file_of_.find(tensor.name);
  PBS_CHECK(file != file_of_.end() && offset >= 0 && bytes >= 0 &&
            bytes <= tensor.bytes - offset);
  return files_[file->second].ReadAt(tensor.begin + offset, bytes, target);
}

}  // namespace pbs
