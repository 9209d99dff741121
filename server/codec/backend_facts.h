// Facts about a backend for GetServerInfo and statistics.
//
// Threading: a value.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pbs/attention.h"
#include "pbs/dtype.h"

namespace pbs::server {

struct BackendFacts {
  std::string name;    // "cpu"
  std::string isa;     // "avx512"
  std::string device;  // "Intel(R) Xeon(R) Processor, 16 threads"
  std::vector<int32_t> head_dims;
  std::vector<DType> dtypes;
  std::vector<Method> methods;
};

}  // namespace pbs::server
