#!/usr/bin/env bash
# Writes the descriptor set of the wire contract: proto/pbs_v1.binpb, which CI compares
# with the .proto files, and the copy inside the Python client, which builds its message
# classes from it. Refuses a change that old peers could not read.
#
#   scripts/update_descriptor_set.sh            after editing proto/pbs/v1/*.proto
#   scripts/update_descriptor_set.sh --output F only write F; nothing is compared
#
# Needs protoc and, unless --output is given, a Python with protobuf (PYTHON=...).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
committed=$root/proto/pbs_v1.binpb
packaged=$root/client/python/pbs_client/pbs_v1.binpb

# error_details.proto: RetryInfo travels in a trailer, so clients need it too.
write_set() {
  (cd "$root/proto" &&
    protoc -I . --include_imports --descriptor_set_out="$1" \
      google/rpc/error_details.proto pbs/v1/*.proto)
}

if [[ $# -eq 2 && $1 == --output ]]; then
  write_set "$(realpath -m "$2")"
  exit
elif [[ $# -ne 0 ]]; then
  echo "usage: $0 [--output FILE]" >&2
  exit 2
fi

new=$(mktemp)
trap 'rm -f "$new"' EXIT
write_set "$new"
if [[ -e $committed ]]; then
  "${PYTHON:-python3}" "$root/tests/structure/check_wire_compat.py" "$committed" "$new"
fi
install -m 644 "$new" "$committed"
install -m 644 "$new" "$packaged"
