// Names the cases of a table test after their `name` field.
#pragma once

#include <string>

namespace pbs::testing_support {

struct CaseName {
  template <class ParamInfo>
  std::string operator()(const ParamInfo& param) const {
    return param.param.name;
  }
};

}  // namespace pbs::testing_support
