#include "cpu/linear_matmul.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

// From libgomp, which oneDNN is linked to. Declared here because <omp.h> would ask for
// the compiler's own OpenMP runtime, which need not be the same.
extern "C" void omp_set_num_threads(int count);

namespace pbs::cpu {
namespace {

dnnl::memory::data_type TypeOf(DType dtype) {
  return dtype == DType::kBF16 ? dnnl::memory::data_type::bf16
                               : dnnl::memory::data_type::f32;
}

dnnl::matmul::primitive_desc MatmulDesc(const dnnl::engine& engine,
                                        const dnnl::memory::desc& x,
                                        const dnnl::memory::desc& panel,
                                        const dnnl::memory::desc& tile) {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
#if DNNL_VERSION_MAJOR >= 3
  return {engine, x, panel, tile, attributes};
#else
  return {dnnl::matmul::desc(x, panel, tile), attributes, engine};
#endif
}

Status OneDnnFailed(const char* what, const dnnl::error& error) {
  return Internal(std::string("oneDNN could not ") + what + ": " + error.what());
}

}  // namespace

RowPiece NextPiece(int64_t rows, int64_t done) {
  const int64_t left = rows - done;
  const auto at_least = std::lower_bound(kRowBuckets.begin(), kRowBuckets.end(),
                                         std::min(left, kRowBlock));
  if (*at_least <= rows) {
    return {.first = std::min(done, rows - *at_least),
            .bucket = at_least - kRowBuckets.begin(),
            .count = *at_least};
  }
  const auto below = at_least - 1;
  return {.first = done, .bucket = below - kRowBuckets.begin(), .count = *below};
}

void UseOneThread() { omp_set_num_threads(1); }

MatmulKernels::MatmulKernels(const dnnl::engine& engine, DType operands, int64_t depth,
                             int64_t cols, int64_t x_stride)
    : engine_(engine),
      operands_(operands),
      depth_(depth),
      cols_(cols),
      x_stride_(x_stride) {}

StatusOr<std::unique_ptr<MatmulKernels>> MatmulKernels::Create(
    const dnnl::engine& engine, DType operands, int64_t depth, int64_t cols,
    int64_t x_stride) {
  UseOneThread();
  auto kernels = std::unique_ptr<MatmulKernels>(
      new MatmulKernels(engine, operands, depth, cols, x_stride));
  try {
    kernels->CreatePrimitives();
  } catch (const dnnl::error& error) {
    return OneDnnFailed("create a product", error);
  }
  if (kernels->implementation_.find("ref") != std::string::npos) {
    return Internal("oneDNN multiplies " + std::string(DTypeName(operands)) +
                    " on this CPU only by its reference code (" +
                    kernels->implementation_ + ")");
  }
  return kernels;
}

void MatmulKernels::CreatePrimitives() {
  using Desc = dnnl::memory::desc;
  const auto type = TypeOf(operands_);
  // The largest bucket chooses the layout; the others must live with it.
  panel_desc_ = Desc({depth_, cols_}, type, dnnl::memory::format_tag::any);
  for (size_t i = kRowBuckets.size(); i-- > 0;) {
    const int64_t rows = kRowBuckets[i];
    Product& product = products_[i];
    product.x_desc = Desc({rows, depth_}, type, dnnl::memory::dims{x_stride_, 1});
    product.tile_desc =
        Desc({rows, cols_}, dnnl::memory::data_type::f32, dnnl::memory::dims{cols_, 1});
    const auto desc =
        MatmulDesc(engine_, product.x_desc, panel_desc_, product.tile_desc);
    panel_desc_ = desc.weights_desc();
    product.scratch_desc = desc.scratchpad_desc();
    product.primitive = dnnl::matmul(desc);
    const std::string_view name = desc.impl_info_str();
    if (implementation_.empty() || name.find("ref") != std::string_view::npos) {
      implementation_ = name;
    }
    scratch_bytes_ =
        std::max(scratch_bytes_, static_cast<int64_t>(product.scratch_desc.get_size()));
  }
  panel_bytes_ = static_cast<int64_t>(panel_desc_.get_size());
}

Status MatmulKernels::Pack(const void* rows, void* panel) const {
  UseOneThread();
  try {
    const dnnl::memory::desc plain({depth_, cols_}, TypeOf(operands_),
                                   dnnl::memory::dims{1, depth_});
    dnnl::memory source(plain, engine_, const_cast<void*>(rows));
    dnnl::memory target = PanelMemory(panel);
    dnnl::stream stream(engine_);
    dnnl::reorder(source, target).execute(stream, source, target);
    stream.wait();
  } catch (const dnnl::error& error) {
    return OneDnnFailed("pack a weight panel", error);
  }
  return OkStatus();
}

dnnl::memory MatmulKernels::PanelMemory(void* panel) const {
  return {panel_desc_, engine_, panel};
}

Status MatmulKernels::Multiply(const void* x, const RowPiece& piece,
                               const dnnl::memory& panel, float* tile,
                               void* scratch) const {
  UseOneThread();
  const Product& product = products_[piece.bucket];
  const int64_t offset = piece.first * x_stride_ * DTypeBytes(operands_);
  try {
    auto* rows = static_cast<char*>(const_cast<void*>(x)) + offset;
    dnnl::stream stream(engine_);
    product.primitive.execute(
        stream,
        {{DNNL_ARG_SRC, dnnl::memory(product.x_desc, engine_, rows)},
         {DNNL_ARG_WEIGHTS, panel},
         {DNNL_ARG_DST, dnnl::memory(product.tile_desc, engine_, tile)},
         {DNNL_ARG_SCRATCHPAD, dnnl::memory(product.scratch_desc, engine_, scratch)}});
    stream.wait();
  } catch (const dnnl::error& error) {
    return OneDnnFailed("multiply", error);
  }
  return OkStatus();
}

}  // namespace pbs::cpu
