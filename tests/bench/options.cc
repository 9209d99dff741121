#include "tests/bench/options.h"

#include <type_traits>
#include <variant>

namespace pbs::bench {

AttentionOptions OptionsOf(const Words& words) {
  const MethodTraits* method = FindMethod(words.Text("method", "pbs"));
  AttentionOptions options =
      DefaultOptions(method != nullptr ? method->method : Method::kPbs);
  for (const OptionTraits& option : AllOptions()) {
    std::visit(
        [&](auto field) {
          using Value = std::decay_t<decltype(options.*field)>;
          if constexpr (std::is_same_v<Value, Scope>) {
            if (words.Text(option.name, "") == ScopeName(Scope::kQueryHead)) {
              options.*field = Scope::kQueryHead;
            }
          } else {
            const double value =
                words.Real(option.name, static_cast<double>(options.*field));
            options.*field = static_cast<Value>(value);
          }
        },
        option.field);
  }
  options.use_given_lists = words.Real("density", 0) > 0;
  return options;
}

}  // namespace pbs::bench
