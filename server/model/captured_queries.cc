#include "server/model/captured_queries.h"

#include <algorithm>
#include <cstddef>
#include <functional>

#include "pbs/check.h"

namespace pbs {

StatusOr<CapturedQueries> CapturedQueries::Create(const QueryShape& shape,
                                                  std::vector<int32_t> layers,
                                                  Backend& backend) {
  PBS_CHECK(std::adjacent_find(layers.begin(), layers.end(), std::greater_equal<>()) ==
            layers.end());
  if (layers.empty()) return CapturedQueries();
  PBS_ASSIGN_OR_RETURN(Buffer buffer,
                       backend.AllocateHost(BytesOf(shape, layers.size())));
  return CapturedQueries(shape, std::move(layers), std::move(buffer));
}

int32_t CapturedQueries::NextLayer(int32_t layer, int32_t end) const {
  const auto found = std::lower_bound(layers_.begin(), layers_.end(), layer);
  return found == layers_.end() ? end : std::min(*found, end);
}

void* CapturedQueries::data(int32_t layer) const {
  const auto found = std::lower_bound(layers_.begin(), layers_.end(), layer);
  if (found == layers_.end() || *found != layer) return nullptr;
  return static_cast<std::byte*>(buffer_.data()) +
         (found - layers_.begin()) * shape_.layer_bytes();
}

}  // namespace pbs
