#!/usr/bin/env bash
# Retrieval accuracy of the bundled model over methods, thresholds and lengths:
# docs/results/quality.json, then docs/BENCHMARKS.md. Some 10 minutes on 2 cores.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

install_packages "${build_packages[@]}"
build_targets bench_worker
python_environment "$repo/.venv" numpy
missed=0
PBS_BENCH_COMMAND="scripts/bench_quality.sh $*" "$repo/.venv/bin/python" \
  "$repo/tests/bench/bench_quality.py" --build "$build_dir" "$@" || missed=$?
"$repo/scripts/bench_report.sh"
exit "$missed"
