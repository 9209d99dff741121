// One prepared benchmark case of bench_worker, timed one run at a time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "pbs/status.h"

namespace pbs {
class Backend;
class Model;
}  // namespace pbs

namespace pbs::bench {

// The NAME=VALUE words of a command, with defaults.
class Words {
 public:
  void Set(const std::string& key, const std::string& value) { words_[key] = value; }
  std::string Text(const std::string& key, const std::string& otherwise) const {
    const auto found = words_.find(key);
    return found == words_.end() ? otherwise : found->second;
  }
  int32_t Integer(const std::string& key, int32_t otherwise) const {
    return std::stoi(Text(key, std::to_string(otherwise)));
  }
  double Real(const std::string& key, double otherwise) const {
    return std::stod(Text(key, std::to_string(otherwise)));
  }

 private:
  std::map<std::string, std::string> words_;
};

class Case {
 public:
  virtual ~Case() = default;
  virtual Status Run() = 0;
  // Further JSON fields of the last run, each with a leading comma.
  virtual std::string Details() const = 0;
};

using CaseOr = StatusOr<std::unique_ptr<Case>>;

// Each makes a case and warms it up.
CaseOr MakeAttentionCase(const Words& words, int threads);
CaseOr MakeLinearCase(const Words& words, std::unique_ptr<Backend> backend);
CaseOr MakePrefillCase(const Words& words, const Model& model);
CaseOr MakeRecallCase(const Words& words, const Model& model);  // not warmed up

}  // namespace pbs::bench
