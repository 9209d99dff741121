// The rows of matrix_cases.h that the CUDA backend plans, with blocks of 128 keys.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/plan/cuda_plan.h"
#include "tests/support/matrix_cases.h"

namespace pbs::testing_support {

// After a dense fallback the backend reports another order and other counts than the
// CPU (ADR 12), which pipeline_test.cc looks at.
inline std::vector<MatrixMethod> MatrixMethodsOfCuda() {
  std::vector<MatrixMethod> methods = MatrixMethods();
  for (MatrixMethod& method : methods) method.options = WithBlocksOf128(method.options);
  std::erase_if(methods, [](const MatrixMethod& method) {
    const AttentionProblem problem =
        MatrixProblem({"", 2, 1, 64, {{700, 700}}}, DType::kBF16, method.options);
    return method.options.dense_fallback || !cuda::MakeCudaPlan(problem, {}).ok();
  });
  return methods;
}

}  // namespace pbs::testing_support
