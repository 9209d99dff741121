#!/usr/bin/env bash
# Measures the data plane on this machine: builds what is missing, makes a model whose KV
# cache is large and whose prefill is short, serves it, runs pbs-bench beside raw TCP and
# writes docs/results/data_plane.json, then docs/BENCHMARKS.md.
#
#   scripts/bench_dataplane.sh                     about a minute
#   OUTPUT=/tmp/x.json scripts/bench_dataplane.sh --rounds 5 --streams 1
#
# Arguments go to pbs-bench. Run it on an idle machine: a neighbour costs both sides, and
# the goals are about both.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
cd "$repo"

run_dir=$build_dir/bench_dataplane
model=$run_dir/model

output=${OUTPUT:-docs/results/data_plane.json}

install_packages "${build_packages[@]}"
python3 -c 'import numpy' 2>/dev/null || install_packages python3-numpy
build_targets pbs-prefilld pbs-bench
mkdir -p "$run_dir" "$(dirname "$output")"
[ -f "$model/config.json" ] ||
  python3 "$repo/tests/models/make_random_model.py" --out "$model" --dtype f32 \
    --hidden-size 64 --intermediate-size 64 --layers 8 --heads 64 --kv-heads 64 \
    --head-dim 128 --vocab-size 256 --positions 8192 --tied

say "starting the server"
"$build_dir/bin/pbs-prefilld" --backend cpu --model "kv=$model" --listen 127.0.0.1:0 \
  --metrics-listen off >"$run_dir/server.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
address=
for _ in $(seq 300); do
  address=$(sed -n 's/.*"event":"serving".*"listen":"\([^"]*\)".*/\1/p' "$run_dir/server.log")
  [ -n "$address" ] && break
  kill -0 "$server" 2>/dev/null || {
    cat "$run_dir/server.log" >&2
    fail "the server stopped"
  }
  sleep 0.1
done
[ -n "$address" ] || fail "the server is not serving after 30 s; see $run_dir/server.log"

say "measuring"
PBS_BENCH_COMMAND="scripts/bench_dataplane.sh $*" "$build_dir/bin/pbs-bench" \
  --server "$address" --server-pid "$server" --output "$output" "$@"
echo "written to $output" >&2
[ "$output" != docs/results/data_plane.json ] || scripts/bench_report.sh
