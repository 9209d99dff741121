#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "pbs/attention.h"

namespace pbs {

std::string HeadDimsText() {
  std::string text;
  for (int32_t head_dim : kHeadDims) {
    text += (text.empty() ? "" : ", ") + std::to_string(head_dim);
  }
  return text;
}

namespace {

std::string Str(int64_t value) { return std::to_string(value); }

Status OutsideRange(const std::string& field, int64_t value, int64_t low,
                    int64_t high) {
  return InvalidArgument(field + " " + Str(value) + " is outside [" + Str(low) + ", " +
                         Str(high) + "]");
}

Status ValidateHeads(const AttentionShape& shape) {
  if (shape.num_heads < 1 || shape.num_heads > kNumHeadsMax) {
    return OutsideRange("num_heads", shape.num_heads, 1, kNumHeadsMax);
  }
  if (shape.num_kv_heads < 1 || shape.num_kv_heads > shape.num_heads) {
    return OutsideRange("num_kv_heads", shape.num_kv_heads, 1, shape.num_heads);
  }
  if (shape.num_heads % shape.num_kv_heads != 0) {
    return InvalidArgument("num_heads " + Str(shape.num_heads) +
                           " is not a multiple of num_kv_heads " +
                           Str(shape.num_kv_heads));
  }
  if (std::find(kHeadDims.begin(), kHeadDims.end(), shape.head_dim) ==
      kHeadDims.end()) {
    return InvalidArgument("head_dim " + Str(shape.head_dim) + " is not one of " +
                           HeadDimsText());
  }
  return OkStatus();
}

Status ValidateSequences(const AttentionProblem& problem) {
  const auto& sequences = problem.shape.sequences;
  if (sequences.empty() || static_cast<int64_t>(sequences.size()) > kNumSequencesMax) {
    return OutsideRange("number of sequences", static_cast<int64_t>(sequences.size()),
                        1, kNumSequencesMax);
  }
  const int64_t head_sequences =
      static_cast<int64_t>(sequences.size()) * problem.shape.num_heads;
  if (head_sequences > kHeadSequencesMax) {
    return OutsideRange("num_heads x number of sequences", head_sequences, 1,
                        kHeadSequencesMax);
  }
  int64_t total_k = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto [q_len, k_len] = sequences[i];
    const std::string of = " of sequence " + Str(static_cast<int64_t>(i));
    if (k_len < 0 || k_len > kSeqLenMax) {
      return OutsideRange("k_len" + of, k_len, 0, kSeqLenMax);
    }
    if (q_len < 0 || q_len > k_len) return OutsideRange("q_len" + of, q_len, 0, k_len);
    const int64_t blocks =
        (k_len + problem.options.block_size - 1) / problem.options.block_size;
    if (blocks > kKeyBlocksMax) {
      return InvalidArgument("k_len " + Str(k_len) + of + " has " + Str(blocks) +
                             " blocks of block_size " +
                             Str(problem.options.block_size) + ", more than " +
                             Str(kKeyBlocksMax) + "; use a larger block_size");
    }
    total_k += k_len;
  }
  if (total_k > kTotalTokensMax) {
    return OutsideRange("total k_len of the batch", total_k, 0, kTotalTokensMax);
  }
  return OkStatus();
}

// Options whose range depends on the heads.
Status ValidateWidths(const AttentionProblem& problem) {
  const int32_t head_dim = problem.shape.head_dim;
  for (const auto& [name, dims] : {std::pair{"slow_dims", problem.options.slow_dims},
                                   std::pair{"fast_dims", problem.options.fast_dims}}) {
    if (dims <= head_dim) continue;
    return InvalidArgument(std::string(name) + " " + Str(dims) + " exceeds head_dim " +
                           Str(head_dim));
  }
  return OkStatus();
}

Status ValidateHasThreshold(const AttentionProblem& problem) {
  if (!problem.has_head_thresholds) return OkStatus();
  if (!HasThreshold(problem.options.method)) {
    return InvalidArgument("method " + std::string(MethodName(problem.options.method)) +
                           " has no head_thresholds; " +
                           MethodsWith(FindOption("threshold")->bit) + " have them");
  }
  if (!problem.options.use_given_lists) return OkStatus();
  return InvalidArgument("use_given_lists and head_thresholds exclude each other");
}

const int32_t* OrderRow(const AttentionGeometry& g, const ConstRows& order,
                        int64_t sequence, int32_t head) {
  return static_cast<const int32_t*>(order.data) +
         order.layout.Offset(sequence, g.sequences[sequence].k_begin, head, 0);
}

}  // namespace

Status ValidateProblem(const AttentionProblem& problem) {
  PBS_RETURN_IF_ERROR(ValidateHeads(problem.shape));
  PBS_RETURN_IF_ERROR(ValidateOptions(problem.options));
  PBS_RETURN_IF_ERROR(ValidateWidths(problem));
  PBS_RETURN_IF_ERROR(ValidateHasThreshold(problem));
  return ValidateSequences(problem);
}

Status ValidateHeadThresholds(const AttentionProblem& problem,
                              std::span<const float> thresholds) {
  const int64_t wanted = problem.has_head_thresholds ? problem.shape.num_heads : 0;
  if (static_cast<int64_t>(thresholds.size()) != wanted) {
    return InvalidArgument("head_thresholds has " +
                           Str(static_cast<int64_t>(thresholds.size())) +
                           " values; the problem has " + Str(wanted));
  }
  for (size_t head = 0; head < thresholds.size(); ++head) {
    if (thresholds[head] > 0 && thresholds[head] <= 1) continue;
    return InvalidArgument("head_thresholds[" + Str(static_cast<int64_t>(head)) + "] " +
                           std::to_string(thresholds[head]) + " is outside (0, 1]");
  }
  return OkStatus();
}

Status ValidateOrder(const AttentionGeometry& geometry, ConstRows order) {
  std::vector<bool> seen(static_cast<size_t>(geometry.segment_size));
  for (size_t n = 0; n < geometry.sequences.size(); ++n) {
    const SequenceGeometry& s = geometry.sequences[n];
    const int32_t body = s.k_len / geometry.segment_size * geometry.segment_size;
    for (int32_t head = 0; head < geometry.num_order_heads; ++head) {
      const int32_t* row = OrderRow(geometry, order, static_cast<int64_t>(n), head);
      for (int32_t slot = 0; slot < s.k_len; ++slot) {
        const int32_t begin = slot / geometry.segment_size * geometry.segment_size;
        if (slot == begin) std::fill(seen.begin(), seen.end(), false);
        const int32_t key = row[slot];
        const int32_t end = slot < body ? begin + geometry.segment_size : s.k_len;
        const bool in_place = slot < body || key == slot;
        if (key < begin || key >= end || !in_place || seen[key - begin]) {
          return InvalidArgument(
              "order of sequence " + Str(static_cast<int64_t>(n)) + ", head " +
              Str(head) + " holds " + Str(key) + " in slot " + Str(slot) +
              "; it must be a permutation inside each segment of " +
              Str(geometry.segment_size) +
              " keys and leave the keys behind the last one in place");
        }
        seen[key - begin] = true;
      }
    }
  }
  return OkStatus();
}

namespace {

// Marks, for one order head, which slot block holds each original key; without an
// order, the block where it starts.
void BlockOfKeys(const AttentionGeometry& g, int64_t sequence, const ConstRows& order,
                 int32_t head, std::vector<int32_t>& block_of) {
  const SequenceGeometry& s = g.sequences[sequence];
  block_of.resize(static_cast<size_t>(s.k_len));
  const int32_t* row =
      order.data == nullptr ? nullptr : OrderRow(g, order, sequence, head);
  for (int32_t slot = 0; slot < s.k_len; ++slot) {
    block_of[row == nullptr ? slot : row[slot]] = slot / g.block_size;
  }
}

Status ValidateRow(const AttentionGeometry& g, const SequenceGeometry& s, int32_t block,
                   std::span<const uint16_t> list, const std::vector<int32_t>& block_of,
                   bool order_given, const std::string& where) {
  const int32_t capacity = g.RowCapacity(s, block);
  if (static_cast<int64_t>(list.size()) > capacity) {
    return InvalidArgument("block list" + where + " has " +
                           Str(static_cast<int64_t>(list.size())) +
                           " entries, more than the " + Str(capacity) +
                           " blocks up to the end of its segment");
  }
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i] >= capacity) {
      return InvalidArgument("block list" + where + " holds block " + Str(list[i]) +
                             "; only blocks below " + Str(capacity) +
                             " (the end of its own segment) can be read");
    }
    if (i > 0 && list[i] <= list[i - 1]) {
      return InvalidArgument("block list" + where + " is not strictly ascending: " +
                             Str(list[i - 1]) + " before " + Str(list[i]));
    }
  }
  if (!order_given && (block / g.blocks_per_segment + 1) * g.segment_size <= s.k_len) {
    for (int32_t own = capacity - g.blocks_per_segment; own < capacity; ++own) {
      if (!std::binary_search(list.begin(), list.end(), static_cast<uint16_t>(own))) {
        return InvalidArgument("block list" + where + " misses block " + Str(own) +
                               " of its own segment, and no order says where its " +
                               "queries' own keys lie");
      }
    }
  }
  const int32_t first = std::max(block * g.block_size, s.query_offset);
  const int32_t last = std::min((block + 1) * g.block_size, s.k_len);
  for (int32_t position = first; position < last; ++position) {
    const auto own = static_cast<uint16_t>(block_of[position]);
    if (!std::binary_search(list.begin(), list.end(), own)) {
      return InvalidArgument("block list" + where + " misses block " + Str(own) +
                             ", which holds the key of position " + Str(position) +
                             ": every query must reach its own position");
    }
  }
  return OkStatus();
}

}  // namespace

Status ValidateLists(const AttentionGeometry& geometry, ConstRows order,
                     const BlockListsView& lists) {
  const int64_t rows = geometry.total_query_blocks * geometry.num_heads;
  if (lists.num_rows != rows) {
    return InvalidArgument("block lists have " + Str(lists.num_rows) +
                           " rows; heads x query blocks are " + Str(rows));
  }
  std::vector<int32_t> block_of;
  for (size_t n = 0; n < geometry.sequences.size(); ++n) {
    const SequenceGeometry& s = geometry.sequences[n];
    int32_t mapped_head = -1;
    for (int32_t head = 0; head < geometry.num_heads; ++head) {
      if (geometry.OrderHead(head) != mapped_head) {
        mapped_head = geometry.OrderHead(head);
        BlockOfKeys(geometry, static_cast<int64_t>(n), order, mapped_head, block_of);
      }
      for (int32_t i = 0; i < s.num_query_blocks; ++i) {
        const int64_t row = geometry.ListRow(static_cast<int32_t>(n), head, i);
        const int32_t block = s.first_query_block + i;
        const std::string where = " of sequence " + Str(static_cast<int64_t>(n)) +
                                  ", head " + Str(head) + ", query block " + Str(block);
        PBS_RETURN_IF_ERROR(ValidateRow(geometry, s, block, lists.Row(row), block_of,
                                        order.data != nullptr, where));
      }
    }
  }
  return OkStatus();
}

}  // namespace pbs
