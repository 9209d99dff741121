#!/usr/bin/env bash
# What the queue's rules do to short and long prompts: simulated with the rates of a GPU
# (docs/results/scheduling_simulation.json) and served on this machine's CPU
# (scheduling_cpu.json), then docs/BENCHMARKS.md.
#
#   scripts/bench_scheduling.sh                     some 5 minutes on 2 cores
#   scripts/bench_scheduling.sh --only simulation   no server: a minute
#   scripts/bench_scheduling.sh --only cpu --rounds 3
#
# The machine should have nothing else to do while the server is timed.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

install_packages "${build_packages[@]}"
build_targets pbs-prefilld scheduling_simulation
python_environment "$repo/.venv" numpy
python=$repo/.venv/bin/python
model=$build_dir/models/scheduling
[ -f "$model/config.json" ] || {
  say "making a random model of 16 small layers"
  "$python" "$repo/tests/models/make_random_model.py" --out "$model" --dtype f32 \
    --hidden-size 512 --intermediate-size 1536 --layers 16 --heads 8 --kv-heads 2 \
    --head-dim 64 --vocab-size 1024 --positions 16384 --tied
}
say "measuring"
missed=0
PBS_BIN=$build_dir/bin PBS_BENCH_COMMAND="scripts/bench_scheduling.sh $*" "$python" \
  "$repo/tests/bench/bench_scheduling.py" --model "$model" "$@" || missed=$?
"$repo/scripts/bench_report.sh"
exit "$missed"
