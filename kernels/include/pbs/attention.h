// Permuted block-sparse attention (PBS-Attn, arXiv 2510.21270) and its baselines.
//
// A *method* is a key order plus a block selection (docs/KERNELS.md). One attention
// kernel serves every method: keys and values are laid out by the order, and each block
// of queries reads the key blocks that its list names.
//
//   dense         identity order, every causal block
//   pbs           keys sorted by importance inside each segment; past blocks selected
//                 by pooled attention mass; the query block's own segment read whole
//                 (sections 3.1-3.3)
//   the others    identity order; causal blocks selected by the method's own scores;
//                 the diagonal block forced. Sorted keys are an option.
//
// attention_options.h has the table of methods and their options.
//
// Shapes: q and o [heads, q_len, head_dim], k and v [kv_heads, k_len, head_dim] per
// sequence. Query head h reads KV head h / (num_heads / num_kv_heads). The queries of a
// sequence are the *last* q_len of its k_len positions (query_offset = k_len - q_len),
// and a query sees the keys at its own and earlier positions. Logits are scaled by
// 1/sqrt(head_dim). q, k, v and o share one dtype; softmax and sums are f32.
//
// Use: call Plan() once per problem, then Run() any number of times with a workspace of
// plan.workspace_bytes. ReadReport() waits for a run and gives its statistics.
// StartReport() and FinishReport() split that in two calls, so that the device can
// compute meanwhile. Plan() runs on the host and is pure. Run() allocates nothing; on a
// device it only enqueues.
//
// The caller refuses inputs that are not finite. Method dense passes them on: a NaN in
// a query or key reaches the rows that see it. A NaN in a value also reaches other rows
// that read its key block (0 * NaN), as in any tiled kernel.
//
// Threading: a backend may be used from one thread at a time. Plans are immutable.
// Determinism: on one backend and ISA, equal inputs give equal bits on every run.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pbs/attention_options.h"
#include "pbs/block_lists.h"
#include "pbs/dtype.h"
#include "pbs/limits.h"
#include "pbs/status.h"
#include "pbs/workspace.h"

namespace pbs {

struct SequenceShape {
  int32_t q_len = 0;  // 0 .. k_len
  int32_t k_len = 0;  // 0 .. kSeqLenMax
};

struct AttentionShape {
  int32_t num_heads = 0;     // query heads, 1 .. kNumHeadsMax
  int32_t num_kv_heads = 0;  // divides num_heads
  int32_t head_dim = 0;      // one of kHeadDims
  std::vector<SequenceShape> sequences;
};

struct AttentionProblem {
  AttentionShape shape;
  DType dtype = DType::kF32;
  AttentionOptions options;
  // The caller can give AttentionTensors::pooled_queries.
  bool offers_pooled_queries = false;
  // Every run brings AttentionTensors::head_thresholds, which replace
  // options.threshold. For methods with a threshold, without use_given_lists.
  bool has_head_thresholds = false;
};

// OK when every field is inside its documented range and the fields agree.
// InvalidArgument names field, value and limit.
Status ValidateProblem(const AttentionProblem& problem);

// Columns of the bands of prism, with its defaults applied.
struct BandWidths {
  int32_t slow = 0;
  int32_t fast = 0;
};
BandWidths BandWidthsOf(const AttentionProblem& problem);

// Positions of the blocks, rows and list entries of one sequence. They follow from the
// problem alone.
struct SequenceGeometry {
  int32_t q_len = 0;
  int32_t k_len = 0;
  int32_t query_offset = 0;       // position of the first query
  int64_t q_begin = 0;            // queries of earlier sequences
  int64_t k_begin = 0;            // keys of earlier sequences
  int32_t num_key_blocks = 0;     // ceil(k_len / block_size)
  int32_t first_query_block = 0;  // absolute block of the first query
  int32_t num_query_blocks = 0;   // the first and the last may be short
  int64_t slot_begin = 0;         // key slots of earlier sequences, whole blocks
  int64_t query_block_begin = 0;  // query blocks of earlier sequences, one head
  int64_t entries_begin = 0;      // list entries of earlier sequences, all heads
  int64_t entries_per_head = 0;   // worst case of one head
  bool dense = false;             // runs dense for any options
};

struct AttentionGeometry {
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t group_size = 0;       // query heads per KV head
  int32_t num_order_heads = 0;  // heads with an order: num_kv_heads or num_heads
  int32_t head_dim = 0;
  int32_t block_size = 0;
  int32_t segment_size = 0;  // == block_size unless keys are sorted
  int32_t blocks_per_segment = 0;
  std::vector<SequenceGeometry> sequences;
  int64_t total_q = 0;
  int64_t total_k = 0;
  int64_t total_slots = 0;         // key slots of all sequences, one head
  int64_t total_query_blocks = 0;  // query blocks of all sequences, one head
  int64_t total_entries = 0;       // worst-case list entries, all heads

  // Row of the block lists (block_lists.h).
  int64_t ListRow(int32_t sequence, int32_t head, int32_t query_block) const {
    const SequenceGeometry& s = sequences[sequence];
    return s.query_block_begin * num_heads +
           static_cast<int64_t>(head) * s.num_query_blocks + query_block;
  }
  // The most blocks that query block `block` (absolute index) may read: all blocks up
  // to the end of its own segment.
  int32_t RowCapacity(const SequenceGeometry& s, int32_t block) const {
    const int32_t end = (block / blocks_per_segment + 1) * blocks_per_segment;
    return end < s.num_key_blocks ? end : s.num_key_blocks;
  }
  // The KV head that query head `head` reads.
  int32_t KvHead(int32_t head) const { return head / group_size; }
  // The order that query head `head` reads.
  int32_t OrderHead(int32_t head) const {
    return num_order_heads == num_heads ? head : KvHead(head);
  }
};

// Requires ValidateProblem(problem).ok().
AttentionGeometry MakeGeometry(const AttentionProblem& problem);

// Layout of an operand's rows, in elements. Each row is contiguous.
struct RowLayout {
  // Distance between sequences, or kPacked: sequence s starts after the rows of the
  // earlier ones.
  int64_t sequence_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;

  static constexpr int64_t kPacked = -1;

  int64_t Offset(int64_t sequence, int64_t rows_before, int64_t head,
                 int64_t row) const {
    const int64_t start = sequence_stride == kPacked ? rows_before * row_stride
                                                     : sequence * sequence_stride;
    return start + head * head_stride + row * row_stride;
  }
};

// [batch, heads, len, width]
constexpr RowLayout DenseBatchLayout(int64_t heads, int64_t len, int64_t width) {
  return {.sequence_stride = heads * len * width,
          .head_stride = len * width,
          .row_stride = width};
}
// [heads, total, width], sequences back to back
constexpr RowLayout PackedLayout(int64_t total, int64_t width) {
  return {.sequence_stride = RowLayout::kPacked,
          .head_stride = total * width,
          .row_stride = width};
}
// [total, heads, width] inside rows of `row_width` elements, sequences back to back
constexpr RowLayout TokenMajorLayout(int64_t row_width, int64_t width) {
  return {.sequence_stride = RowLayout::kPacked,
          .head_stride = width,
          .row_stride = row_width};
}

struct ConstRows {
  const void* data = nullptr;
  RowLayout layout;
};
struct Rows {
  void* data = nullptr;
  RowLayout layout;
};

// q, k, v, o: problem.dtype, width head_dim.
struct AttentionTensors {
  ConstRows q;
  ConstRows k;
  ConstRows v;
  Rows o;
  // Optional (data may be null): f32, width 1; natural log of the softmax denominator.
  Rows lse;
  // With use_given_order: int32, width 1, [num_order_heads, k_len] per sequence: the
  // original position of the key in each slot. Must satisfy ValidateOrder().
  ConstRows order;
  // With use_given_lists: must satisfy ValidateLists(). `num_masked` is not read.
  BlockListsView lists;
  // Required when AttentionPlan::pooled_queries_bytes is above 0: f32
  // [num_query_blocks, num_heads, head_dim], for each query block the sum of its rows
  // of q divided by block_size, as Backend::Qkv() writes it.
  const float* pooled_queries = nullptr;
  // With has_head_thresholds, else empty: the threshold of each query head,
  // [num_heads], in ordinary memory. It must satisfy ValidateHeadThresholds(). A head
  // with threshold 1 reads every block.
  std::span<const float> head_thresholds = {};
};

// OK when `order` permutes keys inside segments only and leaves the keys after the last
// whole segment in place; InvalidArgument names head and slot.
Status ValidateOrder(const AttentionGeometry& geometry, ConstRows order);

// OK when the problem has head thresholds and each of its query heads has one in (0,
// 1], or when it has none and `thresholds` is empty. InvalidArgument names the number
// of thresholds, or head and value.
Status ValidateHeadThresholds(const AttentionProblem& problem,
                              std::span<const float> thresholds);

// OK when every row is strictly ascending, inside the row's own or earlier segments,
// and reads the blocks that hold the positions of its own queries. Without an order
// (null data) these positions may be anywhere in their segment, so the row must read
// the whole segment. InvalidArgument names sequence, head and query block.
Status ValidateLists(const AttentionGeometry& geometry, ConstRows order,
                     const BlockListsView& lists);

// Sizes of the parts of a workspace, for documentation and tests.
struct AttentionMemory {
  int64_t packed_bytes = 0;   // permuted keys and values: linear in the tokens
  int64_t order_bytes = 0;    // positions of the slots, int32
  int64_t lists_bytes = 0;    // worst case of the uint16 lists; chosen lines
  int64_t pooled_bytes = 0;   // block means and block scores
  int64_t scratch_bytes = 0;  // per thread
};

// Backends derive from it; only the backend that made a plan can run it.
struct AttentionPlan {
  virtual ~AttentionPlan() = default;

  AttentionProblem problem;
  AttentionGeometry geometry;
  AttentionMemory memory;
  int64_t workspace_bytes = 0;
  // Bytes of AttentionTensors::pooled_queries, which Run() requires when this is above
  // 0. It is above 0 only for problems that offer them. With 0, Run() pools queries
  // itself where it needs them.
  int64_t pooled_queries_bytes = 0;
};

struct RunControl {
  // When set and true, Run() stops at the next KV head and returns Cancelled; the
  // outputs are then unspecified.
  const std::atomic<bool>* stop = nullptr;
};

// A block is the product of one query block with one key block. Counts are sums over
// sequences and query heads.
struct AttentionStats {
  int64_t executed_blocks = 0;  // computed, above the diagonal too
  // Blocks that dense attention would compute on the same tiles: where keys were
  // permuted, every block up to the end of the query block's segment, else the causal
  // blocks.
  int64_t dense_blocks = 0;
  int64_t lower_blocks = 0;    // computed, on or below the diagonal
  int64_t causal_blocks = 0;   // on or below the diagonal
  double executed_flops = 0;   // 4 * block_size^2 * head_dim per executed block
  double dense_flops = 0;      // the same per dense block
  double coverage = 0;         // mean over the sampled rows; 0 when none
  int64_t coverage_rows = 0;   // rows sampled
  double permute_seconds = 0;  // scoring, sorting, gathering keys and values
  double select_seconds = 0;   // pooling, block scores, lists
  double attend_seconds = 0;
  // The method that ran; kDense also when every sequence was short or fell back.
  Method method_run = Method::kDense;
  bool dense_fallback = false;  // at least one order head fell back to dense

  // Share executed_blocks / dense_blocks, which equals executed_flops / dense_flops: 0
  // .. 1. It is 1 for dense runs and for runs without any block.
  double Density() const;
  // Share lower_blocks / causal_blocks: 0 .. 1; 1 without any block.
  double LowerDensity() const;
  // Ratio executed_blocks / causal_blocks, as published densities count. It exceeds 1
  // on short prompts, because pbs also computes blocks above the diagonal.
  double CausalRatio() const;
};

// The keys that a query head of a sequence reads one by one (minference): slots of
// keys, and distances from the query's position back to a slot. Both ascend.
struct ChosenLines {
  std::vector<int32_t> columns;
  std::vector<int32_t> distances;

  bool operator==(const ChosenLines&) const = default;
};

// Statistics of query heads, over all sequences.
struct AttentionHeads {
  std::vector<double> density;  // [num_heads]
  std::vector<double>
      coverage;  // [num_heads], over the sampled rows; empty without any
  // Those that read every block in at least one sequence because of coverage_min,
  // ascending.
  std::vector<int32_t> guarded;
};

struct AttentionReport {
  AttentionStats stats;
  AttentionHeads heads;
  // Only on request: `order`, int32 [num_order_heads, k_len] per sequence, packed like
  // the keys (head_stride is total_k), and `lists`, the lists that ran, with `lines`,
  // [num_sequences, num_heads] or none: a head without lines reads its blocks whole.
  std::vector<int32_t> order;
  BlockLists lists;
  std::vector<ChosenLines> lines;
};

// The i-th of `num_rows` sampled query rows of a sequence: evenly spaced, mid-interval.
constexpr int32_t CoverageRow(int32_t i, int32_t num_rows, int32_t q_len) {
  return static_cast<int32_t>((2 * static_cast<int64_t>(i) + 1) * q_len /
                              (2 * static_cast<int64_t>(num_rows)));
}

// The most reports that may be started and not yet finished.
inline constexpr int kReportsUnderWayMax = 2;

struct ReportRequest {
  bool order = false;
  bool lists = false;
};

class AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;

  // InvalidArgument as ValidateProblem(); Unimplemented names what this backend
  // supports instead.
  virtual StatusOr<std::unique_ptr<AttentionPlan>> Plan(
      const AttentionProblem& problem) const = 0;

  // Requires validated order and lists where the options use them; outputs must not
  // overlap inputs. ResourceExhausted when the workspace is smaller than planned;
  // InvalidArgument when finite inputs overflow f32 logits (pbs, mean_pooling).
  // After an error the outputs are unspecified and the backend stays usable.
  virtual Status Run(const AttentionPlan& plan, const AttentionTensors& tensors,
                     Workspace workspace, const RunControl& control) = 0;

  // Waits for the last Run() on `workspace` and reads its results there. Requires that
  // this Run() was the backend's last and returned OK, and that no report is under way.
  // InvalidArgument when finite inputs overflowed f32 logits and Run(), which only
  // enqueued, could not report it.
  virtual Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                            const ReportRequest& request, AttentionReport* report) = 0;

  // StartReport() and FinishReport() do the same in two calls, without order and lists.
  // Reports finish in the order in which they were started. At most kReportsUnderWayMax
  // are under way: while that many are, neither Run() nor StartReport() may be called.
  //
  // Saves the results of the last Run() in `workspace`; the caller may reuse the
  // workspace afterwards. On a device it only enqueues. Requires that this Run() was
  // the backend's last and returned OK. After an error no report was started.
  virtual Status StartReport(const AttentionPlan& plan, Workspace workspace) = 0;
  // Finishes the oldest started report, whose run had plan `plan`: waits for the run
  // and fills `report->stats` and `report->heads`. Errors as ReadReport(); after
  // an error, too, the report is no longer under way.
  virtual Status FinishReport(const AttentionPlan& plan, AttentionReport* report) = 0;
};

}  // namespace pbs
