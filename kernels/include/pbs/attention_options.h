// Attention methods and their options, as tables.
//
// A method is a row of MethodOf(): whether it sorts keys, which *scorer* estimates how
// much attention a block of queries pays to each block of keys, which *rule* keeps
// blocks by these scores, and which options it has. An option is a row of
// AllOptions(): its name and its range. Validation, digests, the protocol and the
// command lines read the tables.
//
// Threading: values. Memory: none.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>

#include "pbs/limits.h"
#include "pbs/status.h"

namespace pbs {

// The order of the values is part of the protocol (proto/pbs/v1/types.proto, Method).
enum class Method : uint8_t {
  kDense,
  kPbs,
  kMeanPooling,
  kXAttention,
  kMInference,
  kFlexPrefill,
  kPrism,
  kFlashPrefill,
};
inline constexpr std::array kMethods = {Method::kDense,       Method::kPbs,
                                        Method::kMeanPooling, Method::kXAttention,
                                        Method::kMInference,  Method::kFlexPrefill,
                                        Method::kPrism,       Method::kFlashPrefill};

// The queries that decide a key order.
enum class Scope : uint8_t {
  // One order per KV head, from the mean importance over its query heads. This is the
  // default: it takes num_heads / num_kv_heads times less permuted memory and traffic
  // (appendix G).
  kKvHead,
  // One order per query head. It equals the published code, including that code's
  // rounding of logits and block means to the input dtype (docs/adr/0003).
  kQueryHead,
};

// Documented at each field: the methods that have the option, its unit and range. The
// defaults are those of a call of Attend without options.
struct AttentionOptions {
  Method method = Method::kPbs;
  // Tokens of a query or key block; a power of two in [kBlockSizeMin, kBlockSizeMax].
  int32_t block_size = 128;
  // Sorted keys: tokens of a segment; a multiple of block_size, at most
  // kSegmentSizeMax. A sequence with k_len <= segment_size runs dense, unless order or
  // lists are given.
  int32_t segment_size = 256;
  // pbs, mean_pooling, xattention, prism: estimated attention mass to keep per query
  // block, (0, 1]. A higher threshold selects more blocks; 1 selects every candidate.
  float threshold = 0.9f;
  Scope scope = Scope::kKvHead;  // sorted keys
  // pbs, mean_pooling, xattention, flexprefill, prism: every query block also reads the
  // block that holds key 0.
  bool force_first_block = true;
  // Sorted keys: use AttentionTensors::order instead of scoring keys.
  bool use_given_order = false;
  // Every method except dense: use AttentionTensors::lists instead of selecting blocks.
  bool use_given_lists = false;
  // Run an order head of a sequence dense (identity order, every causal block) when its
  // lists select at least kDenseFallbackRatio of the causal blocks: sparse attention
  // then saves no time. AttentionStats reports it.
  bool dense_fallback = false;
  // Query rows per sequence and head whose exact attention coverage is measured;
  // 0 measures none. At most kCoverageRowsMax.
  int32_t coverage_rows = 0;

  // Every method except dense: sort the keys inside segments by importance, which pbs
  // always does. The method then selects blocks of earlier segments, and every query
  // block reads its own segment whole.
  bool permute = false;
  // Every method except dense, in blocks: the last query blocks of a sequence that read
  // every earlier block; the first key blocks that every query block reads; the key
  // blocks up to and including the diagonal that every query block reads. 0 to
  // kKeyBlocksMax.
  int32_t dense_tail_blocks = 0;
  int32_t sink_blocks = 0;
  int32_t window_blocks = 0;
  // Every method except dense: a block that is not selected and whose keys all come
  // before the query tile takes part as one key, with the mean of its keys and values
  // (arXiv 2608.19758).
  bool mean_correction = false;
  // Every method except dense: repeat what the published code does where it differs
  // from its paper (docs/KERNELS.md, "As published").
  bool as_published = false;

  // Every method that selects whole blocks: a query head of a sequence whose sampled
  // rows keep less than this share of the attention mass on average reads every block
  // instead. AttentionReport names these heads. [0, 1]; 0: no head; above 0 it needs
  // coverage_rows.
  float coverage_min = 0;

  // xattention: tokens between sampled antidiagonals; a power of two in [2, 64], at
  // most block_size.
  int32_t stride = 8;
  // minference: key columns and diagonals that the last queries choose, in tokens; 1 to
  // kSeqLenMax. A sequence with k_len <= slash_tokens runs dense, unless order or lists
  // are given.
  int32_t vertical_tokens = 1000;
  int32_t slash_tokens = 6096;
  // flexprefill: attention mass to keep, (0, 1], and the distance of estimate and
  // attention below which a head selects per query block, [0, 1].
  float gamma = 0.95f;
  float tau = 0.1f;
  // prism: the threshold of the fast band, [0, 1]; 0: as `threshold`.
  float fast_threshold = 0;
  // prism: columns of the slow and of the fast rotary pairs; even, at most head_dim. 0:
  // three quarters and a half of head_dim.
  int32_t slow_dims = 0;
  int32_t fast_dims = 0;
  // flashprefill: keep blocks of at least this share of the largest score, (0, 1].
  float alpha = 0.1f;

  bool operator==(const AttentionOptions&) const = default;
};

inline constexpr double kDenseFallbackRatio = 0.95;

// How the attention that a query block pays to key blocks is estimated.
enum class Scorer : uint8_t {
  kNone,
  kMeans,         // means of query block and key block
  kAntidiagonal,  // sums along antidiagonals of strided queries and keys
  kLines,         // columns and diagonals of the last queries' attention
  kBands,         // means, once for the slow and once for the fast rotary pairs
  kRows,          // every query row and the mean of the key block
};

// Which blocks are kept, given their scores.
enum class Rule : uint8_t {
  kAll,
  kCover,            // the fewest whose mass reaches a threshold
  kCoverWithForced,  // the same, with the mass of the forced blocks counted first
  kLargestLines,     // a fixed number of columns and diagonals
  kCoverLines,       // the columns and diagonals whose mass reaches a threshold
  kShareOfLargest,   // all that reach a share of the largest
};

// One bit per option, in the order of AllOptions().
using OptionSet = uint32_t;

struct MethodTraits {
  Method method = Method::kDense;
  const char* name = "";  // as in the protocol and on command lines
  const char* summary = "";
  Scorer scorer = Scorer::kNone;
  Rule rule = Rule::kAll;
  bool permutes = false;  // sorts keys without `permute`
  // A sequence of at most this many blocks runs dense.
  int32_t dense_blocks_max = 0;
  OptionSet options = 0;

  bool Selects() const { return rule != Rule::kAll; }
};

// `method` must be one of kMethods.
const MethodTraits& TraitsOf(Method method);
// "dense", "pbs", ...
const char* MethodName(Method method);
// True when the method has the option `threshold`.
bool HasThreshold(Method method);
// nullptr when no method has this name.
const MethodTraits* FindMethod(std::string_view name);
// The names of the methods that have the option of this bit: "pbs, mean_pooling".
std::string MethodsWith(OptionSet option);

const char* ScopeName(Scope scope);  // "kv_head", "query_head"

struct OptionTraits {
  using Field = std::variant<int32_t AttentionOptions::*, float AttentionOptions::*,
                             bool AttentionOptions::*, Scope AttentionOptions::*>;

  OptionSet bit = 0;
  const char* name = "";  // as in the protocol; on command lines with hyphens
  Field field;
  // Range of a number. `low_excluded`: (low, high], else [low, high].
  double low = 0;
  double high = 0;
  bool low_excluded = false;
};

std::span<const OptionTraits> AllOptions();
// nullptr when no option has this name.
const OptionTraits* FindOption(std::string_view name);

// The documented defaults of `method`. With `as_published`, those of the published
// code.
AttentionOptions DefaultOptions(Method method, bool as_published = false);

// True when keys are sorted inside segments.
bool Permutes(const AttentionOptions& options);

// True when every query block reads the block that holds key 0.
bool ForcesFirstBlock(const AttentionOptions& options);

// True when the method selects every candidate whatever the inputs are.
bool SelectsEveryBlock(const AttentionOptions& options);

// True when a sequence of `k_len` keys runs dense whatever the inputs are: the method
// is dense, or the sequence is short for it. Given lists are used all the same, and so
// is a given order.
bool RunsDense(const AttentionOptions& options, int32_t k_len);

// Every option that the method has and that decides its results, in a fixed order:
// "pbs block_size=128 threshold=0.899999976 ...". Equal results have equal texts.
std::string CanonicalText(const AttentionOptions& options);

// InvalidArgument names an option that is outside its range, or that differs from its
// default although the method does not have it.
Status ValidateOptions(const AttentionOptions& options);

}  // namespace pbs
