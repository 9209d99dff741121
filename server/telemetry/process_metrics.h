// Facts of the operating system about this process, under the standard names of
// Prometheus clients.
//
// Threading: Collect() runs on the metrics server's threads. Memory: none.
#pragma once

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <vector>

namespace pbs::server {

// process_resident_memory_bytes, process_cpu_seconds_total, process_start_time_seconds,
// process_open_fds, process_max_fds. A value that the system does not provide is left
// out.
class ProcessMetrics final : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override;
};

}  // namespace pbs::server
