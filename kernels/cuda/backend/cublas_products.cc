#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/backend/products.h"

namespace pbs::cuda {
namespace {

constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;  // what Hopper's kernels ask for
// Shapes whose algorithm is remembered; prompts end in tiles of any length.
constexpr size_t kShapesMax = 4096;
constexpr char kLibrary[] = "libcublasLt.so.13";

// The functions that are used, from a library that is never unloaded.
struct Cublas {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) choose = nullptr;
  decltype(&cublasLtMatmulDescInit_internal) init_operation = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_operation = nullptr;
  decltype(&cublasLtMatrixLayoutInit_internal) init_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceInit_internal) init_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtGetStatusString) describe = nullptr;
};

StatusOr<Cublas> Load(const std::string& library) {
  const std::string file = library.empty() ? kLibrary : library;
  void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return FailedPrecondition("cannot load cuBLASLt: " + std::string(dlerror()) +
                              "; name its file in cuda.cublaslt");
  }
  Cublas cublas;
  std::string missing;
  const auto find = [&]<class Function>(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (function == nullptr) missing = name;
  };
  find(cublas.create, "cublasLtCreate");
  find(cublas.destroy, "cublasLtDestroy");
  find(cublas.matmul, "cublasLtMatmul");
  find(cublas.choose, "cublasLtMatmulAlgoGetHeuristic");
  find(cublas.init_operation, "cublasLtMatmulDescInit_internal");
  find(cublas.set_operation, "cublasLtMatmulDescSetAttribute");
  find(cublas.init_layout, "cublasLtMatrixLayoutInit_internal");
  find(cublas.init_preference, "cublasLtMatmulPreferenceInit_internal");
  find(cublas.set_preference, "cublasLtMatmulPreferenceSetAttribute");
  find(cublas.describe, "cublasLtGetStatusString");
  if (!missing.empty()) {
    return FailedPrecondition(file + " has no " + missing +
                              ", so it is no cuBLASLt 13");
  }
  return cublas;
}

cudaDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return CUDA_R_16F;
    case DType::kBF16:
      return CUDA_R_16BF;
    case DType::kF32:
      break;
  }
  return CUDA_R_32F;
}

// Column-major, as cuBLAS sees it: y^T [cols, rows] = W^T (transposed) x^T.
class CublasProducts final : public Products {
 public:
  CublasProducts(const Cublas& cublas, cublasLtHandle_t handle, void* stream)
      : cublas_(cublas), handle_(handle), stream_(static_cast<cudaStream_t>(stream)) {}
  ~CublasProducts() override { cublas_.destroy(handle_); }

  int64_t workspace_bytes() const override { return kWorkspaceBytes; }

  Status Multiply(const Product& product) override {
    const ProductSpec& spec = product.spec;
    Operation operation;
    PBS_RETURN_IF_ERROR(Describe(product, operation));
    PBS_ASSIGN_OR_RETURN(const cublasLtMatmulAlgo_t* algorithm,
                         AlgorithmFor(spec, product.rows, operation));
    const float alpha = 1;
    const float beta = spec.adds ? 1 : 0;
    return Check("cublasLtMatmul",
                 cublas_.matmul(handle_, &operation.product, &alpha, product.weight,
                                &operation.weight, product.x, &operation.x, &beta,
                                product.y, &operation.y, product.y, &operation.y,
                                algorithm, product.workspace.data,
                                static_cast<size_t>(kWorkspaceBytes), stream_));
  }

 private:
  struct Operation {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t weight, x, y;
  };
  using Shape =
      std::tuple<int64_t, int64_t, int64_t, DType, DType, bool, bool, int64_t, int64_t>;

  Status Check(const char* what, cublasStatus_t status) const {
    if (status == CUBLAS_STATUS_SUCCESS) return OkStatus();
    if (status == CUBLAS_STATUS_ALLOC_FAILED) {
      return ResourceExhausted(std::string(what) + ": " + cublas_.describe(status));
    }
    return Internal(std::string(what) + ": " + cublas_.describe(status));
  }

  Status Describe(const Product& product, Operation& operation) const {
    const ProductSpec& spec = product.spec;
    const auto layout = [&](cublasLtMatrixLayoutOpaque_t& target, DType dtype,
                            int64_t rows, int64_t cols, int64_t stride) {
      return Check("cublasLtMatrixLayoutInit",
                   cublas_.init_layout(&target, sizeof target, TypeOf(dtype),
                                       static_cast<uint64_t>(rows),
                                       static_cast<uint64_t>(cols), stride));
    };
    PBS_RETURN_IF_ERROR(
        layout(operation.weight, spec.operands, spec.depth, spec.cols, spec.depth));
    PBS_RETURN_IF_ERROR(
        layout(operation.x, spec.operands, spec.depth, product.rows, spec.x_stride));
    PBS_RETURN_IF_ERROR(
        layout(operation.y, spec.result, spec.cols, product.rows, spec.y_stride));
    PBS_RETURN_IF_ERROR(
        Check("cublasLtMatmulDescInit",
              cublas_.init_operation(&operation.product, sizeof operation.product,
                                     CUBLAS_COMPUTE_32F, CUDA_R_32F)));
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      return Check(
          "cublasLtMatmulDescSetAttribute",
          cublas_.set_operation(&operation.product, attribute, &value, sizeof value));
    };
    const cublasOperation_t transposed = CUBLAS_OP_T;
    PBS_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_DESC_TRANSA, transposed));
    if (!spec.biased) return OkStatus();
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    PBS_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue));
    const auto bias_type = static_cast<int32_t>(TypeOf(spec.result));
    PBS_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, bias_type));
    return set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias);
  }

  // Chosen once per shape.
  StatusOr<const cublasLtMatmulAlgo_t*> AlgorithmFor(const ProductSpec& spec,
                                                     int64_t rows,
                                                     Operation& operation) {
    const Shape shape = {rows,          spec.depth,    spec.cols,
                         spec.operands, spec.result,   spec.adds,
                         spec.biased,   spec.x_stride, spec.y_stride};
    if (const auto known = algorithms_.find(shape); known != algorithms_.end()) {
      return &known->second;
    }
    cublasLtMatmulPreferenceOpaque_t preference;
    PBS_RETURN_IF_ERROR(Check("cublasLtMatmulPreferenceInit",
                              cublas_.init_preference(&preference, sizeof preference)));
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute,
                         const auto& value) {
      return Check(
          "cublasLtMatmulPreferenceSetAttribute",
          cublas_.set_preference(&preference, attribute, &value, sizeof value));
    };
    const auto workspace = static_cast<uint64_t>(kWorkspaceBytes);
    PBS_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace));
    // Parts of a sum are never added in 16 bits.
    const auto reductions =
        static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    PBS_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions));
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    PBS_RETURN_IF_ERROR(Check(
        "cublasLtMatmulAlgoGetHeuristic",
        cublas_.choose(handle_, &operation.product, &operation.weight, &operation.x,
                       &operation.y, &operation.y, &preference, 1, &best, &found)));
    if (found == 0) {
      return Internal("cuBLASLt has no algorithm for a product of [" +
                      std::to_string(rows) + ", " + std::to_string(spec.depth) +
                      "] and [" + std::to_string(spec.depth) + ", " +
                      std::to_string(spec.cols) + "]");
    }
    if (algorithms_.size() >= kShapesMax) algorithms_.clear();
    return &algorithms_.emplace(shape, best.algo).first->second;
  }

  const Cublas cublas_;
  const cublasLtHandle_t handle_;
  const cudaStream_t stream_;
  std::map<Shape, cublasLtMatmulAlgo_t> algorithms_;
};

}  // namespace

StatusOr<std::unique_ptr<Products>> CreateCublasProducts(void* stream,
                                                         const std::string& library) {
  PBS_ASSIGN_OR_RETURN(const Cublas cublas, Load(library));
  cublasLtHandle_t handle = nullptr;
  if (const cublasStatus_t status = cublas.create(&handle);
      status != CUBLAS_STATUS_SUCCESS) {
    return Internal(std::string("cublasLtCreate: ") + cublas.describe(status));
  }
  return std::unique_ptr<Products>(new CublasProducts(cublas, handle, stream));
}

}  // namespace pbs::cuda
