#include "tests/bench/options.h"

namespace pbs::bench {

AttentionOptions OptionsOf(const Words& words) {
  AttentionOptions options;
  const MethodTraits* method = FindMethod(words.Text("method", "pbs"));
  if (method != nullptr) options.method = method->method;
  options.scope = words.Text("scope", "kv_head") == "query_head" ? Scope::kQueryHead
                                                                 : Scope::kKvHead;
  options.segment_size = words.Integer("segment", 256);
  options.threshold = static_cast<float>(words.Real("threshold", 0.9));
  options.vertical_tokens = words.Integer("vertical_tokens", options.vertical_tokens);
  options.slash_tokens = words.Integer("slash_tokens", options.slash_tokens);
  options.use_given_lists = words.Real("density", 0) > 0;
  return options;
}

}  // namespace pbs::bench
