#include "tests/bench/options.h"

namespace pbs::bench {

AttentionOptions OptionsOf(const Words& words) {
  AttentionOptions options;
  const std::string method = words.Text("method", "pbs");
  options.method = method == "dense"          ? Method::kDense
                   : method == "mean_pooling" ? Method::kMeanPooling
                                              : Method::kPbs;
  options.scope = words.Text("scope", "kv_head") == "query_head" ? Scope::kQueryHead
                                                                 : Scope::kKvHead;
  options.segment_size = words.Integer("segment", 256);
  options.threshold = static_cast<float>(words.Real("threshold", 0.9));
  options.use_given_lists = words.Real("density", 0) > 0;
  return options;
}

}  // namespace pbs::bench
