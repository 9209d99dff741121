#!/usr/bin/env bash
# Times the CPU backend beside torch in one run, and measures a prefill's memory:
# docs/results/cpu_{attention,linear,prefill,memory}.json, then docs/BENCHMARKS.md.
#
#   scripts/bench_cpu.sh                                  everything: some 40 minutes on 2 cores
#   scripts/bench_cpu.sh --only attention --lengths 4096  a part of it
#
# The machine should have nothing else to do. Needs a Python package index for torch.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

install_packages "${build_packages[@]}"
build_targets bench_worker
python_environment "$repo/.venv" torch==2.13.0 transformers safetensors
python=$repo/.venv/bin/python
model=$build_dir/models/1b-4layer
[ -f "$model/config.json" ] || {
  say "making a random model of 4 layers in the shape of a 1B Llama"
  "$python" "$repo/tests/models/make_random_model.py" --preset 1b-4layer --out "$model"
}
say "timing"
PBS_BENCH_COMMAND="scripts/bench_cpu.sh $*" "$python" "$repo/tests/bench/bench_cpu.py" \
  --build "$build_dir" --model "$model" "$@"
"$repo/scripts/bench_report.sh"
