// Attention of the reference under a decision, and its coverage.
#include "reference/reference_attention.h"

#include <algorithm>
#include <cmath>

#include "reference/operands.h"
#include "reference/reference_spans.h"

namespace pbs::reference {
namespace {

// Calls visit(operands, sequence, head, query row, list row) for every query row.
template <class Visitor>
void ForEachQuery(const AttentionProblem& problem, const AttentionTensors& tensors,
                  const AttentionGeometry& g, Visitor&& visit) {
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    const Operands in(problem, tensors, g, n);
    for (int32_t head = 0; head < g.num_heads; ++head) {
      for (int32_t row = 0; row < s.q_len; ++row) {
        const int32_t block = (s.query_offset + row) / g.block_size;
        visit(in, n, head, row, g.ListRow(n, head, block - s.first_query_block));
      }
    }
  }
}

double Dot(const Operands& in, const AttentionGeometry& g, int32_t head, int32_t row,
           int32_t key, LogitSum logit_sum) {
  double wide = 0;
  float narrow = 0;
  for (int32_t d = 0; d < g.head_dim; ++d) {
    const double q = in.Q(head, row, d);
    const double k = in.K(g.KvHead(head), key, d);
    if (logit_sum == LogitSum::kF64) {
      wide += q * k;
    } else {
      narrow = std::fma(static_cast<float>(q), static_cast<float>(k), narrow);
    }
  }
  return logit_sum == LogitSum::kF64 ? wide : narrow;
}

// Scaled logits of one query row against every key; keys it must not see are -inf.
std::vector<double> CausalLogits(const Operands& in, const AttentionGeometry& g,
                                 int32_t head, int32_t row,
                                 LogitSum logit_sum = LogitSum::kF64) {
  const SequenceGeometry& s = in.shape();
  std::vector<double> logits(static_cast<size_t>(s.k_len), -INFINITY);
  for (int32_t key = 0; key <= s.query_offset + row; ++key) {
    logits[key] = Dot(in, g, head, row, key, logit_sum) / std::sqrt(g.head_dim);
  }
  return logits;
}

// With chosen lines, only these blocks of a list are read whole.
bool IsWhole(const AttentionOptions& options, const AttentionGeometry& g,
             const SequenceGeometry& s, int32_t query_block, int32_t block) {
  const int32_t own = query_block / g.blocks_per_segment * g.blocks_per_segment;
  return IsForced(options, s, query_block - s.first_query_block, block) ||
         (Permutes(options) && block >= own);
}

// Which slots one query row of a head reads: of the blocks of its list, and of the
// head's columns.
std::vector<bool> ReadSlots(const AttentionOptions& options, const AttentionGeometry& g,
                            const SequenceGeometry& s, int32_t row,
                            std::span<const uint16_t> list, const ChosenLines& lines) {
  const bool whole_blocks = lines.distances.empty();
  const int32_t position = s.query_offset + row;
  LineSlots of_lines;
  std::vector<bool> read(static_cast<size_t>(s.k_len));
  if (!whole_blocks) {
    of_lines = SlotsOfLines(lines, s.k_len, position);
    read = of_lines.as_column;
  }
  for (uint16_t block : list) {
    const bool whole =
        whole_blocks || IsWhole(options, g, s, position / g.block_size, block);
    const int32_t end = std::min((block + 1) * g.block_size, s.k_len);
    for (int32_t slot = block * g.block_size; slot < end; ++slot) {
      if (whole || of_lines.in_span[slot]) read[slot] = true;
    }
  }
  return read;
}

const ChosenLines& LinesOfHead(const AttentionGeometry& g, const Decision& decision,
                               int32_t sequence, int32_t head) {
  static const ChosenLines kNone;
  if (decision.lines.empty()) return kNone;
  return decision.lines[sequence * g.num_heads + head];
}

const int32_t* OrderOfHead(const AttentionGeometry& g, const Decision& decision,
                           int32_t sequence, int32_t head) {
  return decision.order.data() + g.OrderHead(head) * g.total_k +
         g.sequences[sequence].k_begin;
}

// A block that takes part in a row's softmax as one key.
struct MeanKey {
  double logit = 0;
  std::vector<double> value;
};

// Mean keys and values of the blocks that the row's list leaves out, of which it reads
// no column and whose keys all come before the first row of its query block. Their mass
// is that of as many equal keys.
std::vector<MeanKey> CorrectingKeys(const Operands& in, const AttentionGeometry& g,
                                    int32_t head, int32_t row, const int32_t* order,
                                    std::span<const uint16_t> list,
                                    const std::vector<bool>& read) {
  const SequenceGeometry& s = in.shape();
  const int32_t query_block = (s.query_offset + row) / g.block_size;
  const int32_t first_row = std::max(query_block * g.block_size, s.query_offset);
  std::vector<MeanKey> keys;
  for (int32_t block = 0; block < s.num_key_blocks; ++block) {
    const int32_t* begin = order + block * g.block_size;
    const int32_t* end = order + std::min((block + 1) * g.block_size, s.k_len);
    const auto first = read.begin() + (begin - order);
    const bool selected =
        std::find(list.begin(), list.end(), block) != list.end() ||
        std::find(first, first + (end - begin), true) != first + (end - begin);
    if (selected || *std::max_element(begin, end) >= first_row) continue;
    const auto length = static_cast<double>(end - begin);
    MeanKey& mean = keys.emplace_back();
    mean.value.resize(static_cast<size_t>(g.head_dim));
    for (int32_t d = 0; d < g.head_dim; ++d) {
      double key_sum = 0;
      for (const int32_t* key = begin; key < end; ++key) {
        key_sum += in.K(g.KvHead(head), *key, d);
        mean.value[d] += in.V(g.KvHead(head), *key, d) / length;
      }
      mean.logit += in.Q(head, row, d) * key_sum / length;
    }
    mean.logit = mean.logit / std::sqrt(g.head_dim) + std::log(length);
  }
  return keys;
}

// Softmax and weighted sum of values of one row, over the keys with finite logits and
// the mean keys. Writes o [head_dim], which is zeros before, and returns the lse.
double AttendRow(const Operands& in, const AttentionGeometry& g, int32_t head,
                 const std::vector<double>& logits, const std::vector<MeanKey>& means,
                 double* o) {
  double top = -INFINITY;
  for (double logit : logits) top = std::max(top, logit);
  for (const MeanKey& mean : means) top = std::max(top, mean.logit);
  if (std::isinf(top)) return -INFINITY;
  double sum = 0;
  for (int32_t key = 0; key < static_cast<int32_t>(logits.size()); ++key) {
    const double weight = std::exp(logits[key] - top);
    if (weight == 0) continue;
    sum += weight;
    for (int32_t d = 0; d < g.head_dim; ++d) {
      o[d] += weight * in.V(g.KvHead(head), key, d);
    }
  }
  for (const MeanKey& mean : means) {
    const double weight = std::exp(mean.logit - top);
    sum += weight;
    for (int32_t d = 0; d < g.head_dim; ++d) o[d] += weight * mean.value[d];
  }
  for (int32_t d = 0; d < g.head_dim; ++d) o[d] /= sum;
  return top + std::log(sum);
}

}  // namespace

Output Attend(const AttentionProblem& problem, const AttentionTensors& tensors,
              const Decision& decision, LogitSum logit_sum) {
  const AttentionGeometry g = MakeGeometry(problem);
  const BlockListsView lists = decision.lists.View();
  Output out;
  out.o.resize(static_cast<size_t>(g.num_heads * g.total_q * g.head_dim));
  out.lse.resize(static_cast<size_t>(g.num_heads * g.total_q));
  ForEachQuery(
      problem, tensors, g,
      [&](const Operands& in, int32_t n, int32_t head, int32_t row, int64_t list_row) {
        const SequenceGeometry& s = g.sequences[n];
        const int32_t* order = OrderOfHead(g, decision, n, head);
        const std::span<const uint16_t> list = lists.Row(list_row);
        auto logits = CausalLogits(in, g, head, row, logit_sum);
        const auto read = ReadSlots(problem.options, g, s, row, list,
                                    LinesOfHead(g, decision, n, head));
        for (int32_t slot = 0; slot < s.k_len; ++slot) {
          if (!read[slot]) logits[order[slot]] = -INFINITY;
        }
        std::vector<MeanKey> means;
        if (problem.options.mean_correction) {
          means = CorrectingKeys(in, g, head, row, order, list, read);
        }
        const int64_t at = head * g.total_q + s.q_begin + row;
        out.lse[at] =
            AttendRow(in, g, head, logits, means, out.o.data() + at * g.head_dim);
      });
  return out;
}

double Coverage(const AttentionProblem& problem, const AttentionTensors& tensors,
                const Decision& decision) {
  const AttentionGeometry g = MakeGeometry(problem);
  const BlockListsView lists = decision.lists.View();
  double total = 0;
  int64_t num_rows = 0;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    const Operands in(problem, tensors, g, n);
    const int32_t rows = std::min(problem.options.coverage_rows, s.q_len);
    for (int32_t head = 0; head < g.num_heads; ++head) {
      for (int32_t i = 0; i < rows; ++i) {
        const int32_t row = CoverageRow(i, rows, s.q_len);
        auto mass = CausalLogits(in, g, head, row);
        Softmax(mass);
        const int32_t block = (s.query_offset + row) / g.block_size;
        const int32_t* order = OrderOfHead(g, decision, n, head);
        const auto read =
            ReadSlots(problem.options, g, s, row,
                      lists.Row(g.ListRow(n, head, block - s.first_query_block)),
                      LinesOfHead(g, decision, n, head));
        for (int32_t slot = 0; slot < s.k_len; ++slot) {
          if (read[slot]) total += mass[order[slot]];
        }
        ++num_rows;
      }
    }
  }
  return num_rows == 0 ? 0.0 : total / static_cast<double>(num_rows);
}

}  // namespace pbs::reference
