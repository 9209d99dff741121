// The table of methods, options and shapes that every attention engine is tested on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "pbs/attention.h"

namespace pbs::testing_support {

struct MatrixMethod {
  std::string name;
  AttentionOptions options;
};

struct MatrixShape {
  const char* name;
  int32_t num_heads, num_kv_heads, head_dim;
  std::vector<SequenceShape> sequences;
};

inline AttentionProblem MatrixProblem(const MatrixShape& shape, DType dtype,
                                      const AttentionOptions& options) {
  AttentionProblem problem;
  problem.shape = {shape.num_heads, shape.num_kv_heads, shape.head_dim,
                   shape.sequences};
  problem.dtype = dtype;
  problem.options = options;
  return problem;
}

// Every method that selects blocks, with options that leave some blocks out. Blocks of
// 16 keys, segments of 32.
inline std::vector<MatrixMethod> SelectingMethods() {
  AttentionOptions pbs;
  pbs.block_size = 16;
  pbs.segment_size = 32;
  pbs.threshold = 0.6f;
  AttentionOptions plain = pbs;
  plain.segment_size = AttentionOptions{}.segment_size;
  const auto with = [](AttentionOptions options, Method method) {
    options.method = method;
    const bool has_threshold =
        (TraitsOf(method).options & FindOption("threshold")->bit) != 0;
    if (!has_threshold) options.threshold = AttentionOptions{}.threshold;
    options.gamma = method == Method::kFlexPrefill ? 0.6f : options.gamma;
    options.alpha = method == Method::kFlashPrefill ? 0.6f : options.alpha;
    return options;
  };
  AttentionOptions minference = with(plain, Method::kMInference);
  minference.vertical_tokens = 36;
  minference.slash_tokens = 60;
  return {{"pbs", pbs},
          {"mean_pooling", with(plain, Method::kMeanPooling)},
          {"xattention", with(plain, Method::kXAttention)},
          {"flexprefill", with(plain, Method::kFlexPrefill)},
          {"prism", with(plain, Method::kPrism)},
          {"flashprefill", with(plain, Method::kFlashPrefill)},
          {"minference", minference}};
}

// Adds variants of methods to a table.
class MethodTable {
 public:
  explicit MethodTable(std::vector<MatrixMethod> methods)
      : methods_(std::move(methods)) {}

  // `change` takes the options of the row named `of`.
  template <class Change>
  void Add(const std::string& name, const std::string& of, Change&& change) {
    const auto base =
        std::find_if(methods_.begin(), methods_.end(),
                     [&](const MatrixMethod& method) { return method.name == of; });
    AttentionOptions options = base->options;
    change(options);
    methods_.push_back({name, options});
  }
  std::vector<MatrixMethod> Take() { return std::move(methods_); }

 private:
  std::vector<MatrixMethod> methods_;
};

// Options that one method has, or that it treats in its own way.
inline void AddOwnOptions(MethodTable& table) {
  table.Add("pbs_large_segments", "pbs", [](auto& o) { o.segment_size = 48; });
  table.Add("pbs_fallback", "pbs", [](auto& o) { o.dense_fallback = true; });
  table.Add("xattention_published", "xattention",
            [](auto& o) { o.as_published = true; });
  table.Add("xattention_stride_2", "xattention", [](auto& o) { o.stride = 2; });
  table.Add("xattention_stride_16", "xattention", [](auto& o) { o.stride = 16; });
  table.Add("flexprefill_query_aware", "flexprefill", [](auto& o) { o.tau = 1; });
  table.Add("flexprefill_lines_only", "flexprefill", [](auto& o) { o.tau = 0; });
  table.Add("flexprefill_published", "flexprefill",
            [](auto& o) { o.as_published = true; });
  table.Add("minference_published", "minference",
            [](auto& o) { o.as_published = true; });
  // The fewest lines: all distances of up to 50 keys.
  table.Add("minference_few_lines", "minference", [](auto& o) {
    o.vertical_tokens = 1;
    o.slash_tokens = 1;
  });
  table.Add("minference_many_columns", "minference",
            [](auto& o) { o.vertical_tokens = 150; });
  table.Add("minference_far", "minference", [](auto& o) { o.slash_tokens = 112; });
  table.Add("minference_fallback", "minference",
            [](auto& o) { o.dense_fallback = true; });
  table.Add("prism_bands", "prism", [](auto& o) {
    o.slow_dims = 12;
    o.fast_dims = 6;
    o.fast_threshold = 0.3f;
  });
  table.Add("flashprefill_published", "flashprefill", [](auto& o) {
    o.as_published = true;
    o.sink_blocks = 1;
    o.window_blocks = 2;
  });
}

// Options of several methods.
inline void AddSharedOptions(MethodTable& table) {
  for (const char* name : {"pbs", "xattention", "flexprefill"}) {
    // So that some heads are guarded and some are not.
    table.Add(std::string(name) + "_guarded", name, [](auto& o) {
      o.coverage_rows = 5;
      o.coverage_min = 0.9f;
    });
  }
  for (const char* name : {"pbs", "mean_pooling", "xattention", "flexprefill"}) {
    table.Add(std::string(name) + "_no_first_block", name,
              [](auto& o) { o.force_first_block = false; });
  }
  for (const char* name : {"pbs", "prism", "minference"}) {
    table.Add(std::string(name) + "_tail_sink_window", name, [](auto& o) {
      o.dense_tail_blocks = 1;
      o.sink_blocks = 2;
      o.window_blocks = 3;
      if (o.method == Method::kMInference) return;
      o.threshold = 0.2f;
      o.force_first_block = false;
    });
  }
  for (const char* name :
       {"mean_pooling", "xattention", "xattention_published", "flexprefill",
        "flexprefill_query_aware", "prism", "flashprefill", "flashprefill_published",
        "minference", "minference_many_columns", "minference_tail_sink_window"}) {
    table.Add(std::string(name) + "_permuted", name, [](auto& o) {
      o.permute = true;
      o.segment_size = 32;
    });
  }
  for (const char* name :
       {"pbs", "prism_permuted", "flashprefill_permuted", "minference_permuted"}) {
    table.Add(std::string(name) + "_query_head", name,
              [](auto& o) { o.scope = Scope::kQueryHead; });
  }
  for (const char* name :
       {"pbs", "pbs_query_head", "mean_pooling", "flexprefill", "flashprefill",
        "xattention_permuted", "prism_tail_sink_window", "minference",
        "minference_permuted", "minference_tail_sink_window"}) {
    table.Add(std::string(name) + "_corrected", name,
              [](auto& o) { o.mean_correction = true; });
  }
}

// The selecting methods, what their options change, and dense.
inline std::vector<MatrixMethod> MatrixMethods() {
  MethodTable table(SelectingMethods());
  AddOwnOptions(table);
  AddSharedOptions(table);
  std::vector<MatrixMethod> methods = table.Take();
  methods.push_back({"dense", {.method = Method::kDense, .block_size = 16}});
  return methods;
}

// For blocks of 16 keys.
inline std::vector<MatrixShape> MatrixShapes() {
  return {{"odd_length", 2, 1, 64, {{149, 149}}},
          {"whole_segments", 2, 2, 32, {{128, 128}}},
          {"tail_of_one", 4, 2, 96, {{129, 129}}},
          {"six_heads_of_one", 6, 1, 32, {{100, 100}}},
          {"wide_head", 1, 1, 256, {{117, 117}}},
          {"one_query", 2, 1, 64, {{1, 131}}},
          {"offset_inside_a_block", 2, 1, 128, {{59, 141}}},
          {"offset_at_a_block", 2, 1, 32, {{64, 160}}},
          {"many_tiles", 6, 2, 32, {{300, 300}}},
          {"packed", 4, 2, 64, {{75, 75}, {0, 0}, {1, 1}, {0, 40}, {33, 110}, {9, 9}}}};
}

// The same options for blocks of 128 keys, and shapes for them.
inline AttentionOptions WithBlocksOf128(AttentionOptions options) {
  const int32_t factor = 128 / options.block_size;
  options.block_size = 128;
  if (Permutes(options)) options.segment_size *= factor;
  return options;
}
inline std::vector<MatrixShape> ShapesOfBlocksOf128() {
  return {{"odd_length", 4, 2, 96, {{701, 701}}},
          {"batch", 4, 2, 64, {{513, 513}, {1, 1}, {90, 650}}}};
}

}  // namespace pbs::testing_support
