#!/usr/bin/env bash
# Writes the tables and plots of docs/BENCHMARKS.md from docs/results/*.json.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

python_environment "$repo/.venv" matplotlib
"$repo/.venv/bin/python" "$repo/tests/bench/report.py"
