// The weight files of a model folder: one model.safetensors, or shards named by
// model.safetensors.index.json.
//
// If both exist, model.safetensors is read. Shards may split a layer anywhere. Every
// tensor of a shard must be in the index, under that shard, and in no other shard. An
// index entry that no shard has is only a note, because the model may not need it.
// Shard names are plain file names inside the folder. Symbolic links (a hub cache) are
// accepted; names with '/' or '..' are refused.
//
// Threading: Read() may be called from many threads. Memory: headers only; every file
// stays open.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "pbs/status.h"
#include "server/model/file.h"
#include "server/model/safetensors.h"

namespace pbs {

inline constexpr int64_t kShardsMax = 512;
inline constexpr int64_t kIndexBytesMax = 16 << 20;
inline constexpr int64_t kCheckpointTensorsMax = 65'536;

// Tensor name -> shard file name, from the text of an index file. InvalidArgument names
// the entry and what is wrong.
StatusOr<std::map<std::string, std::string>> ParseShardIndex(std::string_view text);

class Checkpoint {
 public:
  // Opens and checks every file. NotFound, with advice, when the folder has no weights
  // in a supported format.
  static StatusOr<Checkpoint> Open(const std::string& folder);

  // For a model with several parts: keeps the language model's tensors only, under the
  // names of a model that has no other part ("model.layers...", "lm_head.weight").
  // InvalidArgument when two tensors would get the same name.
  Status KeepTextPart();

  // All tensors, sorted by name.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  // Null when no tensor has that name.
  const TensorInfo* Find(std::string_view name) const;

  // Peculiarities of the files, in sentences.
  const std::vector<std::string>& notes() const { return notes_; }
  // The shard that the index names for a tensor that no shard has; empty otherwise.
  std::string PromisedIn(const std::string& tensor) const;

  // Reads bytes [offset, offset + bytes) of a tensor of this checkpoint, as stored.
  // DataLoss when its file has shrunk.
  Status Read(const TensorInfo& tensor, int64_t offset, int64_t bytes,
              void* target) const;

 private:
  Checkpoint() = default;
  // Adds a file's tensors; with an index, checks them against it.
  Status AddShard(const std::string& folder, const std::string& name,
                  const std::map<std::string, std::string>* index);
  // Adds all shards of an index.
  Status AddShards(const std::string& folder,
                   const std::map<std::string, std::string>& index);
  void SortTensors();

  std::vector<File> files_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, size_t, std::less<>> file_of_;  // by tensor name
  std::map<std::string, std::string> promised_;         // tensor -> shard that lacks it
  std::vector<std::string> notes_;
};

}  // namespace pbs
