#include "pbs/attention_options.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace pbs {
namespace {

// The bits of OptionSet, in the order of kOptions.
enum OptionBit : OptionSet {
  kBlockSize = 1u << 0,
  kThreshold = 1u << 1,
  kForceFirstBlock = 1u << 2,
  kDenseFallback = 1u << 3,
  kSegmentSize = 1u << 4,
  kScope = 1u << 5,
  kStride = 1u << 6,
  kVerticalTokens = 1u << 7,
  kSlashTokens = 1u << 8,
  kGamma = 1u << 9,
  kTau = 1u << 10,
  kFastThreshold = 1u << 11,
  kSlowDims = 1u << 12,
  kFastDims = 1u << 13,
  kAlpha = 1u << 14,
  kPermute = 1u << 15,
  kDenseTailBlocks = 1u << 16,
  kSinkBlocks = 1u << 17,
  kWindowBlocks = 1u << 18,
  kMeanCorrection = 1u << 19,
  kAsPublished = 1u << 20,
  kUseGivenOrder = 1u << 21,
  kUseGivenLists = 1u << 22,
  kCoverageRows = 1u << 23,
  kCoverageMin = 1u << 24,
};

using O = AttentionOptions;
constexpr OptionTraits kOptions[] = {
    {kBlockSize, "block_size", &O::block_size, kBlockSizeMin, kBlockSizeMax},
    {kThreshold, "threshold", &O::threshold, 0, 1, true},
    {kForceFirstBlock, "force_first_block", &O::force_first_block},
    {kDenseFallback, "dense_fallback", &O::dense_fallback},
    {kSegmentSize, "segment_size", &O::segment_size, 1, kSegmentSizeMax},
    {kScope, "scope", &O::scope},
    {kStride, "stride", &O::stride, 2, 64},
    {kVerticalTokens, "vertical_tokens", &O::vertical_tokens, 1, kSeqLenMax},
    {kSlashTokens, "slash_tokens", &O::slash_tokens, 1, kSeqLenMax},
    {kGamma, "gamma", &O::gamma, 0, 1, true},
    {kTau, "tau", &O::tau, 0, 1},
    {kFastThreshold, "fast_threshold", &O::fast_threshold, 0, 1},
    {kSlowDims, "slow_dims", &O::slow_dims, 0, kHeadDims.back()},
    {kFastDims, "fast_dims", &O::fast_dims, 0, kHeadDims.back()},
    {kAlpha, "alpha", &O::alpha, 0, 1, true},
    {kPermute, "permute", &O::permute},
    {kDenseTailBlocks, "dense_tail_blocks", &O::dense_tail_blocks, 0, kKeyBlocksMax},
    {kSinkBlocks, "sink_blocks", &O::sink_blocks, 0, kKeyBlocksMax},
    {kWindowBlocks, "window_blocks", &O::window_blocks, 0, kKeyBlocksMax},
    {kMeanCorrection, "mean_correction", &O::mean_correction},
    {kAsPublished, "as_published", &O::as_published},
    {kUseGivenOrder, "use_given_order", &O::use_given_order},
    {kUseGivenLists, "use_given_lists", &O::use_given_lists},
    {kCoverageRows, "coverage_rows", &O::coverage_rows, 0, kCoverageRowsMax},
    {kCoverageMin, "coverage_min", &O::coverage_min, 0, 1},
};

// What a request decides beside the method: not part of what the method selects.
constexpr OptionSet kOfEveryMethod = kBlockSize | kDenseFallback | kCoverageRows;
constexpr OptionSet kOfSortedKeys = kSegmentSize | kScope | kUseGivenOrder;
constexpr OptionSet kOfSelection = kOfEveryMethod | kPermute | kDenseTailBlocks |
                                   kSinkBlocks | kWindowBlocks | kMeanCorrection |
                                   kAsPublished | kUseGivenLists | kCoverageMin;
constexpr OptionSet kOfMass = kOfSelection | kThreshold | kForceFirstBlock;

constexpr MethodTraits kTraits[] = {
    {.method = Method::kDense,
     .name = "dense",
     .summary = "all blocks",
     .options = kOfEveryMethod},
    {.method = Method::kPbs,
     .name = "pbs",
     .summary = "keys sorted inside segments, then blocks selected by their means",
     .scorer = Scorer::kMeans,
     .rule = Rule::kCover,
     .permutes = true,
     .options = (kOfMass & ~kPermute) | kOfSortedKeys},
    {.method = Method::kMeanPooling,
     .name = "mean_pooling",
     .summary = "blocks selected by their means",
     .scorer = Scorer::kMeans,
     .rule = Rule::kCover,
     .options = kOfMass},
    {.method = Method::kXAttention,
     .name = "xattention",
     .summary = "blocks selected by sampled antidiagonals",
     .scorer = Scorer::kAntidiagonal,
     .rule = Rule::kCoverWithForced,
     .options = kOfMass | kStride},
    {.method = Method::kMInference,
     .name = "minference",
     .summary = "columns and diagonals of the last queries' attention",
     .scorer = Scorer::kLines,
     .rule = Rule::kLargestLines,
     .options = (kOfSelection & ~kCoverageMin) | kVerticalTokens | kSlashTokens},
    {.method = Method::kFlexPrefill,
     .name = "flexprefill",
     .summary = "columns and diagonals of blocks, or blocks by their means, by head",
     .scorer = Scorer::kLines,
     .rule = Rule::kCoverLines,
     .dense_blocks_max = 2,
     .options = kOfSelection | kForceFirstBlock | kGamma | kTau},
    {.method = Method::kPrism,
     .name = "prism",
     .summary = "blocks selected by their means, by slow and fast rotary pairs",
     .scorer = Scorer::kBands,
     .rule = Rule::kCover,
     .options = kOfMass | kFastThreshold | kSlowDims | kFastDims},
    {.method = Method::kFlashPrefill,
     .name = "flashprefill",
     .summary = "blocks whose score reaches a share of the largest",
     .scorer = Scorer::kRows,
     .rule = Rule::kShareOfLargest,
     .options = kOfSelection | kAlpha},
};
static_assert(std::size(kTraits) == kMethods.size());

OptionSet OptionsOf(const AttentionOptions& options) {
  const MethodTraits& traits = TraitsOf(options.method);
  const bool sorts = (traits.options & kPermute) != 0 && options.permute;
  return traits.options | (sorts ? kOfSortedKeys : 0);
}

std::string Text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

// " name=value"
std::string Assignment(const AttentionOptions& options, const OptionTraits& option) {
  std::string text = " " + std::string(option.name) + "=";
  std::visit(
      [&](auto field) {
        const auto x = options.*field;
        if constexpr (std::is_same_v<decltype(x), const Scope>)
          text += ScopeName(x);
        else
          text += Text(static_cast<double>(x));
      },
      option.field);
  return text;
}

bool Differs(const AttentionOptions& a, const AttentionOptions& b,
             const OptionTraits& option) {
  return std::visit([&](auto field) { return a.*field != b.*field; }, option.field);
}

Status OutsideRange(const OptionTraits& option, const std::string& value) {
  return InvalidArgument(std::string(option.name) + " " + value + " is outside " +
                         (option.low_excluded ? "(" : "[") + Text(option.low) + ", " +
                         Text(option.high) + "]");
}

// The shortest text of a float that reads back as the same number.
std::string Short(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, static_cast<float>(value));
  return {text, end.ptr};
}

Status CheckRange(const AttentionOptions& options, const OptionTraits& option) {
  if (option.low == option.high) return OkStatus();  // not a number
  return std::visit(
      [&](auto field) -> Status {
        const auto x = static_cast<double>(options.*field);
        const bool above = option.low_excluded ? x > option.low : x >= option.low;
        if (above && x <= option.high) return OkStatus();
        return OutsideRange(option, Short(x));
      },
      option.field);
}

bool IsPowerOfTwo(int32_t value) {
  return value > 0 && std::has_single_bit(static_cast<uint32_t>(value));
}

Status CheckBlockSize(int32_t block_size) {
  if (IsPowerOfTwo(block_size) && block_size >= kBlockSizeMin &&
      block_size <= kBlockSizeMax) {
    return OkStatus();
  }
  return InvalidArgument("block_size " + std::to_string(block_size) +
                         " is not a power of two in [" + std::to_string(kBlockSizeMin) +
                         ", " + std::to_string(kBlockSizeMax) + "]");
}

// Sizes that must fit the block size.
Status CheckSizes(const AttentionOptions& options, OptionSet has) {
  const std::string block = std::to_string(options.block_size);
  if ((has & kSegmentSize) != 0 && options.segment_size % options.block_size != 0) {
    return InvalidArgument("segment_size " + std::to_string(options.segment_size) +
                           " is not a multiple of block_size " + block);
  }
  if ((has & kStride) != 0 &&
      (!IsPowerOfTwo(options.stride) || options.stride > options.block_size)) {
    return InvalidArgument("stride " + std::to_string(options.stride) +
                           " is not a power of two in [2, 64] of at most block_size " +
                           block);
  }
  for (const auto& [bit, name, value] :
       {std::tuple{kSlowDims, "slow_dims", options.slow_dims},
        std::tuple{kFastDims, "fast_dims", options.fast_dims}}) {
    if ((has & bit) != 0 && value % 2 != 0) {
      return InvalidArgument(std::string(name) + " " + std::to_string(value) +
                             " is odd; rotary pairs have two columns");
    }
  }
  return OkStatus();
}

Status CheckGiven(const AttentionOptions& options) {
  if (!options.use_given_lists) return OkStatus();
  const std::string excludes = "use_given_lists and ";
  if (options.dense_fallback) {
    return InvalidArgument(excludes + "dense_fallback exclude each other");
  }
  for (const auto& [name, value] :
       {std::pair{"dense_tail_blocks", options.dense_tail_blocks},
        std::pair{"sink_blocks", options.sink_blocks},
        std::pair{"window_blocks", options.window_blocks}}) {
    if (value == 0) continue;
    return InvalidArgument(excludes + name + " " + std::to_string(value) +
                           " exclude each other");
  }
  if (options.coverage_min > 0) {
    return InvalidArgument(excludes + "coverage_min " + Short(options.coverage_min) +
                           " exclude each other");
  }
  return OkStatus();
}

}  // namespace

const MethodTraits& TraitsOf(Method method) {
  return kTraits[static_cast<size_t>(method)];
}

const char* MethodName(Method method) { return TraitsOf(method).name; }

bool HasThreshold(Method method) {
  return (TraitsOf(method).options & kThreshold) != 0;
}

const MethodTraits* FindMethod(std::string_view name) {
  const auto* found =
      std::find_if(std::begin(kTraits), std::end(kTraits),
                   [&](const MethodTraits& traits) { return name == traits.name; });
  return found == std::end(kTraits) ? nullptr : found;
}

std::string MethodsWith(OptionSet option) {
  std::string names;
  for (const MethodTraits& traits : kTraits) {
    if ((traits.options & option) == 0) continue;
    names += (names.empty() ? "" : ", ") + std::string(traits.name);
  }
  return names;
}

const char* ScopeName(Scope scope) {
  return scope == Scope::kKvHead ? "kv_head" : "query_head";
}

std::span<const OptionTraits> AllOptions() { return kOptions; }

const OptionTraits* FindOption(std::string_view name) {
  const auto* found =
      std::find_if(std::begin(kOptions), std::end(kOptions),
                   [&](const OptionTraits& option) { return name == option.name; });
  return found == std::end(kOptions) ? nullptr : found;
}

AttentionOptions DefaultOptions(Method method, bool as_published) {
  AttentionOptions options;
  options.method = method;
  if (method == Method::kPrism) options.threshold = 0.95f;
  if (!as_published || !TraitsOf(method).Selects()) return options;
  options.as_published = true;
  if (method == Method::kPbs) options.scope = Scope::kQueryHead;
  if (method == Method::kFlashPrefill) {
    options.sink_blocks = 2;
    options.window_blocks = 4;
    options.dense_tail_blocks = 2;
  }
  return options;
}

bool Permutes(const AttentionOptions& options) {
  return TraitsOf(options.method).permutes || options.permute;
}

bool ForcesFirstBlock(const AttentionOptions& options) {
  return options.force_first_block && (OptionsOf(options) & kForceFirstBlock) != 0;
}

bool SelectsEveryBlock(const AttentionOptions& options) {
  const MethodTraits& traits = TraitsOf(options.method);
  if (!traits.Selects()) return true;
  return (HasThreshold(options.method) && options.threshold >= 1.0f) ||
         ((traits.options & kGamma) != 0 && options.gamma >= 1.0f);
}

bool RunsDense(const AttentionOptions& options, int32_t k_len) {
  const MethodTraits& traits = TraitsOf(options.method);
  if (!traits.Selects()) return true;
  if (options.use_given_lists) return false;
  // The window and the dense tail reach from the last block to the first.
  const int64_t dense_blocks = std::max(
      {traits.dense_blocks_max, options.window_blocks, options.dense_tail_blocks});
  if (k_len <= dense_blocks * options.block_size) return true;
  if (options.use_given_order) return false;
  // With all distances every query reads every key.
  const bool reads_all =
      traits.rule == Rule::kLargestLines && k_len <= options.slash_tokens;
  return reads_all || (Permutes(options) && k_len <= options.segment_size);
}

std::string CanonicalText(const AttentionOptions& options) {
  // The table's first options are written always, the others where they change
  // something, so that an option that is added later changes no text of before.
  constexpr OptionSet kAlways = kPermute - 1;
  // The sampled rows change results only as the rows of the guard.
  OptionSet never = kUseGivenOrder | kUseGivenLists;
  if (options.coverage_min <= 0) never |= kCoverageRows;
  const AttentionOptions defaults = DefaultOptions(options.method);
  const OptionSet has = OptionsOf(options) & ~never;
  std::string text = MethodName(options.method);
  for (const OptionTraits& option : kOptions) {
    if ((has & option.bit) == 0) continue;
    if ((option.bit & kAlways) == 0 && !Differs(options, defaults, option)) continue;
    text += Assignment(options, option);
  }
  return text;
}

Status ValidateOptions(const AttentionOptions& options) {
  const AttentionOptions defaults = DefaultOptions(options.method);
  const OptionSet has = OptionsOf(options);
  PBS_RETURN_IF_ERROR(CheckBlockSize(options.block_size));
  for (const OptionTraits& option : kOptions) {
    if ((has & option.bit) != 0) {
      PBS_RETURN_IF_ERROR(CheckRange(options, option));
    } else if (Differs(options, defaults, option)) {
      const bool needs_permute =
          (option.bit & kOfSortedKeys) != 0 && TraitsOf(options.method).Selects();
      const std::string owners = MethodsWith(option.bit);
      const bool one = owners.find(',') == std::string::npos;
      return InvalidArgument("method " + std::string(MethodName(options.method)) +
                             " has no option" + Assignment(options, option) + "; " +
                             owners +
                             (needs_permute ? " and methods with permute have it"
                              : one         ? " has it"
                                            : " have it"));
    }
  }
  PBS_RETURN_IF_ERROR(CheckSizes(options, has));
  if (options.coverage_min > 0 && options.coverage_rows == 0) {
    return InvalidArgument("coverage_min " + Short(options.coverage_min) +
                           " needs coverage_rows of at least 1");
  }
  return CheckGiven(options);
}

}  // namespace pbs
