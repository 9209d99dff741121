#!/usr/bin/env bash
# Writes the descriptor sets that CI compares with the .proto files:
#
#   proto/pbs_v1.binpb         the wire contract, and its copy inside the Python client,
#                              which builds its message classes from it
#   proto/server_config.binpb  the configuration file of the server
#
# Refuses a change that old peers, or old configuration files, could not live with.
#
#   scripts/update_descriptor_set.sh            after editing proto/pbs/v1/*.proto
#   scripts/update_descriptor_set.sh --output FOLDER  only write there; nothing is compared
#
# Needs protoc and, unless --output is given, a Python with protobuf (PYTHON=...).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
sets=(pbs_v1.binpb server_config.binpb)

write_sets() { # write_sets FOLDER
  local config=pbs/v1/server_config.proto proto
  local wire=(google/rpc/error_details.proto) # RetryInfo travels in a trailer
  cd "$root/proto"
  for proto in pbs/v1/*.proto; do
    [ "$proto" = "$config" ] || wire+=("$proto")
  done
  protoc -I . --include_imports --descriptor_set_out="$1/pbs_v1.binpb" "${wire[@]}"
  protoc -I . --include_imports --descriptor_set_out="$1/server_config.binpb" "$config"
  cd - >/dev/null
}

if [[ $# -eq 2 && $1 == --output ]]; then
  write_sets "$(realpath "$2")"
  exit
elif [[ $# -ne 0 ]]; then
  echo "usage: $0 [--output FOLDER]" >&2
  exit 2
fi

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
write_sets "$new"
for set in "${sets[@]}"; do
  if [[ -e $root/proto/$set ]]; then
    "${PYTHON:-python3}" "$root/tests/structure/check_wire_compat.py" \
      "$root/proto/$set" "$new/$set"
  fi
done
for set in "${sets[@]}"; do install -m 644 "$new/$set" "$root/proto/$set"; done
install -m 644 "$new/pbs_v1.binpb" "$root/client/python/pbs_client/pbs_v1.binpb"
