// Facts about the server and its models, for GetServerInfo and ListModels.
//
// Threading: stateless.
#pragma once

#include <cstdint>

#include "pbs/v1/kv.pb.h"
#include "pbs/v1/prefill.pb.h"
#include "server/engine/served_model.h"
#include "server/service/options.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {

// Minor versions only add.
inline constexpr char kProtocolVersion[] = "1.1";

v1::ModelInfo DescribeModel(const ServedModel& model);
v1::ServerInfo DescribeServer(const ServiceOptions& options, const LeaseStore& leases,
                              int64_t memory_bytes_max);
v1::KvLease DescribeLease(const LeaseView& lease);
v1::KvDescriptor DescribeKv(const LeaseView& lease);

}  // namespace pbs::server
