#!/usr/bin/env bash
# A long mixed load on one server: attention, prefills, fetches, cancels, bad input,
# killed clients. At the end nothing may be held, wrong or grown; tests/soak/soak.py
# says what is checked. Not part of CI.
#
#   scripts/soak.sh [MINUTES]   default 30
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
minutes=${1:-30}

install_packages "${build_packages[@]}"
build_targets pbs-prefilld hanging_client
python_environment "$repo/.venv" ml_dtypes
say "$minutes minutes of load"
"$repo/.venv/bin/python" "$repo/tests/soak/soak.py" --minutes "$minutes" \
  --server "$build_dir/bin/pbs-prefilld" --hanging-client "$build_dir/tests/hanging_client"
say "nothing held, nothing lost, no growth"
