#include "reference/reference_spans.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/reference_rules.h"

namespace pbs::reference {
namespace {

constexpr int32_t kGroup = 64;        // query positions with the same spans
constexpr int32_t kLastQueries = 64;  // that choose
constexpr int32_t kFirstColumns = 30;
constexpr int32_t kNearDistances = 100;
constexpr int32_t kColumnsMin = 30;
constexpr int32_t kDistancesMin = 50;

void Force(int32_t count, std::vector<double>& masses) {
  const size_t forced = std::min(masses.size(), static_cast<size_t>(count));
  std::fill_n(masses.begin(), forced, INFINITY);
}

// The indices of the `count` largest masses, ascending.
std::vector<int32_t> Largest(const std::vector<double>& masses, int32_t count) {
  std::vector<int32_t> chosen = ByFallingScore(masses);
  chosen.resize(std::min(masses.size(), static_cast<size_t>(count)));
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

struct Span {
  int32_t begin;
  int32_t end;
};

// Spans of the positions [group * 64, group * 64 + 64).
std::vector<Span> SpansOf(const ChosenLines& lines, int32_t group) {
  const int32_t group_end = (group + 1) * kGroup;
  std::vector<int32_t> ends;
  for (int32_t distance : lines.distances) {
    if (distance < group_end) ends.push_back(std::max(group_end - distance, kGroup));
  }
  std::sort(ends.begin(), ends.end());
  std::vector<Span> spans;
  for (int32_t end : ends) {
    if (spans.empty() || end > spans.back().end + kGroup) {
      spans.push_back({end - kGroup, end});
    } else if (end > spans.back().end) {
      spans.back().end += kGroup;
    }
  }
  return spans;
}

}  // namespace

LineMasses MeasureLastQueries(const SelectingHead& head) {
  LineMasses masses = MeasureLines(head, kLastQueries,
                                   head.options().as_published ? 128 : head.g.head_dim);
  Force(kFirstColumns, masses.columns);
  Force(kNearDistances, masses.distances);
  return masses;
}

ChosenLines ChooseLines(const SelectingHead& head) {
  const AttentionOptions& options = head.options();
  const LineMasses masses = MeasureLastQueries(head);
  return {Largest(masses.columns, std::max(options.vertical_tokens, kColumnsMin)),
          Largest(masses.distances, std::max(options.slash_tokens, kDistancesMin))};
}

LineSlots SlotsOfLines(const ChosenLines& lines, int32_t k_len, int32_t position) {
  const std::vector<Span> spans = SpansOf(lines, position / kGroup);
  LineSlots slots = {std::vector<bool>(static_cast<size_t>(k_len)),
                     std::vector<bool>(static_cast<size_t>(k_len))};
  for (const Span& span : spans) {
    for (int32_t slot = span.begin; slot < std::min(span.end, k_len); ++slot) {
      slots.in_span[slot] = true;
    }
  }
  for (int32_t slot : lines.columns) {
    slots.as_column[slot] = slot < spans.back().begin && !slots.in_span[slot];
  }
  return slots;
}

Kept KeepSpans(const SelectingHead& head, const ChosenLines& lines) {
  const SequenceGeometry& s = head.s();
  Kept kept;
  for (int32_t i = 0; i < s.num_query_blocks; ++i) {
    std::vector<bool> row(static_cast<size_t>(s.num_key_blocks));
    const int32_t begin = head.Block(i) * head.g.block_size;
    for (int32_t position = begin; position < begin + head.g.block_size; ++position) {
      const bool first_of_group =
          position % kGroup == 0 || position == begin || position == s.query_offset;
      if (!head.HasQuery(position) || !first_of_group) continue;
      const LineSlots slots = SlotsOfLines(lines, s.k_len, position);
      for (int32_t slot = 0; slot < s.k_len; ++slot) {
        if (slots.in_span[slot]) row[slot / head.g.block_size] = true;
      }
    }
    kept.push_back(row);
  }
  return kept;
}

}  // namespace pbs::reference
