#include "cpu/linear_layers.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/host_memory.h"
#include "pbs/check.h"
#include "pbs/limits.h"

namespace pbs::cpu {
namespace {

constexpr int64_t kAlignment = 64;
// Jobs per worker below which the rows of a call are split as well.
constexpr int64_t kJobsPerWorkerMin = 4;

int64_t Align(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

struct Panel {
  const MatmulKernels* kernels = nullptr;
  int64_t first_col = 0;  // row of W
  char* data = nullptr;   // stored elements
  dnnl::memory memory;    // when the stored elements are the operands
};

struct CpuLinear final : PackedLinear {
  Buffer storage;
  std::vector<float> bias;    // empty or [out_features]
  std::vector<Panel> panels;  // of both halves for kSwiGlu, the gate's first
  bool widened = false;       // panels are stored narrower than they multiply

  int64_t num_sides() const { return spec.epilogue == LinearEpilogue::kSwiGlu ? 2 : 1; }
  // Panels (or pairs of a gate and an up panel).
  int64_t num_units() const {
    return static_cast<int64_t>(panels.size()) / num_sides();
  }
};

// One worker's slice of the workspace.
struct WorkerScratch {
  int64_t panel_bytes = 0;  // one side; 0 unless widened
  int64_t tile_bytes = 0;   // one side
  int64_t onednn_bytes = 0;
  int64_t num_sides = 1;

  int64_t bytes() const {
    return num_sides * (panel_bytes + tile_bytes) + onednn_bytes;
  }
};

WorkerScratch ScratchOf(const CpuLinear& linear) {
  WorkerScratch scratch;
  scratch.num_sides = linear.num_sides();
  scratch.tile_bytes = kRowBlock * kPanelCols * DTypeBytes(DType::kF32);
  for (const Panel& panel : linear.panels) {
    if (linear.widened) {
      scratch.panel_bytes =
          std::max(scratch.panel_bytes, Align(panel.kernels->panel_bytes()));
    }
    scratch.onednn_bytes =
        std::max(scratch.onednn_bytes, Align(panel.kernels->scratch_bytes()));
  }
  return scratch;
}

int64_t StoredBytes(const MatmulKernels& kernels, const LinearSpec& spec) {
  return kernels.panel_bytes() / DTypeBytes(spec.compute_dtype) *
         DTypeBytes(spec.weight_dtype);
}

Element ElementOf(DType dtype) { return static_cast<Element>(dtype); }

// Reads and packs one panel after another.
class Packer {
 public:
  Packer(const PointwiseKernels& pointwise, const RowReader& read, CpuLinear& linear)
      : pointwise_(pointwise), read_(read), linear_(linear) {
    const int64_t elements = kPanelCols * linear.spec.in_features;
    rows_.resize(static_cast<size_t>(elements * DTypeBytes(linear.spec.weight_dtype)));
    if (linear.widened) wide_rows_.resize(static_cast<size_t>(elements));
  }

  Status Pack(Panel& panel) {
    const LinearSpec& spec = linear_.spec;
    const int64_t cols = panel.kernels->cols();
    PBS_RETURN_IF_ERROR(read_(panel.first_col, cols, rows_.data()));
    if (!linear_.widened) {
      PBS_RETURN_IF_ERROR(panel.kernels->Pack(rows_.data(), panel.data));
      panel.memory = panel.kernels->PanelMemory(panel.data);
      return OkStatus();
    }
    // The layout is chosen for f32; narrowing back what was just widened is exact.
    const Element stored = ElementOf(spec.weight_dtype);
    const int64_t elements = panel.kernels->panel_bytes() / DTypeBytes(DType::kF32);
    wide_panel_.assign(static_cast<size_t>(elements), 0.0f);
    pointwise_.widen(rows_.data(), stored, wide_rows_.data(), cols * spec.in_features);
    PBS_RETURN_IF_ERROR(panel.kernels->Pack(wide_rows_.data(), wide_panel_.data()));
    pointwise_.narrow(wide_panel_.data(), panel.data, stored, elements);
    return OkStatus();
  }

 private:
  const PointwiseKernels& pointwise_;
  const RowReader& read_;
  CpuLinear& linear_;
  std::vector<char> rows_;
  std::vector<float> wide_rows_;
  std::vector<float> wide_panel_;
};

// One call of a linear layer; jobs run on the pool's workers.
class LinearCall {
 public:
  LinearCall(const PointwiseKernels& pointwise, const CpuLinear& linear, const void* x,
             void* y, Workspace workspace)
      : pointwise_(pointwise),
        linear_(linear),
        x_(x),
        y_(static_cast<char*>(y)),
        workspace_(static_cast<char*>(workspace.data)),
        scratch_(ScratchOf(linear)) {}

  // Rows [begin, end) of one unit; rows before `begin` may be multiplied again.
  void Run(int64_t unit, int64_t begin, int64_t end, int worker) {
    char* slice = workspace_ + worker * scratch_.bytes();
    dnnl::memory operands[2];
    const Panel* panels[2] = {};
    float* tiles[2] = {};
    for (int64_t side = 0; side < scratch_.num_sides; ++side) {
      panels[side] = &linear_.panels[unit + side * linear_.num_units()];
      char* own = slice + side * (scratch_.panel_bytes + scratch_.tile_bytes);
      operands[side] = Operand(*panels[side], own);
      tiles[side] = reinterpret_cast<float*>(own + scratch_.panel_bytes);
    }
    char* onednn = slice + scratch_.bytes() - scratch_.onednn_bytes;
    for (int64_t done = begin; done < end;) {
      const RowPiece piece = NextPiece(end, done);
      for (int64_t side = 0; side < scratch_.num_sides; ++side) {
        const Status status = panels[side]->kernels->Multiply(x_, piece, operands[side],
                                                              tiles[side], onednn);
        if (!status.ok()) return Fail(status);
      }
      for (int64_t row = done; row < piece.first + piece.count; ++row) {
        Finish(row, row - piece.first, panels, tiles);
      }
      done = piece.first + piece.count;
    }
  }

  Status TakeStatus() { return std::move(status_); }

 private:
  dnnl::memory Operand(const Panel& panel, char* scratch) const {
    if (!linear_.widened) return panel.memory;
    dnnl::memory memory = panel.kernels->PanelMemory(scratch);
    pointwise_.widen(panel.data, ElementOf(linear_.spec.weight_dtype),
                     reinterpret_cast<float*>(scratch),
                     panel.kernels->panel_bytes() / DTypeBytes(DType::kF32));
    return memory;
  }

  // One row of a unit's output.
  void Finish(int64_t row, int64_t tile_row, const Panel* const* panels,
              float* const* tiles) const {
    const LinearSpec& spec = linear_.spec;
    const int64_t cols = panels[0]->kernels->cols();
    const float* sums = tiles[0] + tile_row * cols;
    const float* bias = Bias(*panels[0]);
    const bool adds = spec.epilogue == LinearEpilogue::kAdd;
    const DType y_dtype = adds ? DType::kF32 : spec.compute_dtype;
    void* y = y_ + (row * spec.y_stride + panels[0]->first_col) * DTypeBytes(y_dtype);
    switch (spec.epilogue) {
      case LinearEpilogue::kStore:
        return pointwise_.store_sums(sums, bias, cols, y, ElementOf(y_dtype));
      case LinearEpilogue::kAdd:
        return pointwise_.add_sums(sums, bias, cols, static_cast<float*>(y));
      case LinearEpilogue::kSwiGlu:
        return pointwise_.swiglu_sums(sums, bias, tiles[1] + tile_row * cols,
                                      Bias(*panels[1]), cols, y, ElementOf(y_dtype));
    }
  }

  const float* Bias(const Panel& panel) const {
    return linear_.bias.empty() ? nullptr : linear_.bias.data() + panel.first_col;
  }

  void Fail(const Status& status) {
    const std::lock_guard lock(mutex_);
    if (status_.ok()) status_ = status;
  }

  const PointwiseKernels& pointwise_;
  const CpuLinear& linear_;
  const void* const x_;
  char* const y_;
  char* const workspace_;
  const WorkerScratch scratch_;
  std::mutex mutex_;
  Status status_;
};

Status CheckSpec(const LinearSpec& spec) {
  const bool same = spec.weight_dtype == spec.compute_dtype;
  if (spec.compute_dtype == DType::kF16 ||
      (spec.compute_dtype == DType::kBF16 && !same)) {
    return InvalidArgument(std::string(DTypeName(spec.weight_dtype)) +
                           " weights cannot be multiplied as " +
                           DTypeName(spec.compute_dtype));
  }
  return OkStatus();
}

}  // namespace

LinearLayers::LinearLayers(ThreadPool& pool, const PointwiseKernels& pointwise)
    : pool_(pool), pointwise_(pointwise), engine_(dnnl::engine::kind::cpu, 0) {}

StatusOr<const MatmulKernels*> LinearLayers::KernelsFor(DType operands, int64_t depth,
                                                        int64_t cols,
                                                        int64_t x_stride) {
  auto& kernels = kernels_[{operands, depth, cols, x_stride}];
  if (kernels == nullptr) {
    PBS_ASSIGN_OR_RETURN(
        kernels, MatmulKernels::Create(engine_, operands, depth, cols, x_stride));
  }
  return kernels.get();
}

StatusOr<std::unique_ptr<PackedLinear>> LinearLayers::Pack(
    const LinearSpec& spec, const RowReader& read, std::span<const float> bias) {
  PBS_RETURN_IF_ERROR(CheckSpec(spec));
  auto linear = std::make_unique<CpuLinear>();
  linear->spec = spec;
  linear->bias.assign(bias.begin(), bias.end());
  linear->widened = spec.weight_dtype != spec.compute_dtype;

  const int64_t side_cols = spec.out_features / linear->num_sides();
  std::vector<int64_t> offsets;
  for (int64_t side = 0; side < linear->num_sides(); ++side) {
    for (int64_t col = 0; col < side_cols; col += kPanelCols) {
      const int64_t cols = std::min(kPanelCols, side_cols - col);
      PBS_ASSIGN_OR_RETURN(
          const MatmulKernels* kernels,
          KernelsFor(spec.compute_dtype, spec.in_features, cols, spec.x_stride));
      linear->panels.push_back({kernels, side * side_cols + col, nullptr, {}});
      offsets.push_back(linear->bytes);
      linear->bytes += Align(StoredBytes(*kernels, spec));
    }
  }
  PBS_ASSIGN_OR_RETURN(linear->storage, AllocatePages(linear->bytes));
  Packer packer(pointwise_, read, *linear);
  for (size_t i = 0; i < linear->panels.size(); ++i) {
    Panel& panel = linear->panels[i];
    panel.data = static_cast<char*>(linear->storage.data()) + offsets[i];
    PBS_RETURN_IF_ERROR(packer.Pack(panel));
  }
  return StatusOr<std::unique_ptr<PackedLinear>>(std::move(linear));
}

int64_t LinearLayers::WorkspaceBytes(const PackedLinear& linear) const {
  return ScratchOf(static_cast<const CpuLinear&>(linear)).bytes() * pool_.num_threads();
}

Status LinearLayers::Run(const PackedLinear& linear, const void* x, int64_t rows,
                         void* y, Workspace workspace) {
  PBS_CHECK(rows >= 1);
  const int64_t needed = WorkspaceBytes(linear);
  if (workspace.bytes < needed) {
    return ResourceExhausted("linear workspace of " + std::to_string(workspace.bytes) +
                             " bytes is smaller than the " + std::to_string(needed) +
                             " planned");
  }
  const auto& cpu_linear = static_cast<const CpuLinear&>(linear);
  const int64_t units = cpu_linear.num_units();
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t wanted_jobs = kJobsPerWorkerMin * pool_.num_threads();
  const int64_t groups = std::min(blocks, (wanted_jobs + units - 1) / units);
  LinearCall call(pointwise_, cpu_linear, x, y, workspace);
  pool_.ParallelFor(units * groups, [&](int64_t job, int worker) {
    const int64_t group = job % groups;
    const int64_t begin = blocks * group / groups * kRowBlock;
    const int64_t end = std::min(rows, blocks * (group + 1) / groups * kRowBlock);
    call.Run(job / groups, begin, end, worker);
  });
  return call.TakeStatus();
}

}  // namespace pbs::cpu
