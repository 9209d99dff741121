#!/usr/bin/env bash
# One run on a machine with a GPU: builds the kernels alone, checks them, times them
# beside their peers. Nine minutes at most; no network, no gRPC: nvcc, CMake, ninja, and a
# python3 with torch and triton.
#
#   scripts/gpu_suite.sh              results to docs/results/gpu_attention.json
#   OUT=FOLDER scripts/gpu_suite.sh   results, and what each part said, to FOLDER
#
# PBS_GPU_SECONDS: what all of it may take (default 530); the timings get what the rest
# leaves. PBS_COMMIT: what the results name where there is no git.
#
# Each family of kernels is checked by processes of its own: a fault or a hang ends one
# case, not the others. Exit status 1 when something is wrong, not when something could
# not be checked.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
seconds_max=${PBS_GPU_SECONDS:-530}
out=$(realpath -m "${OUT:-$repo/docs/results}")
build=$(realpath -m "${PBS_BUILD_DIR:-$repo/build-gpu}")
commit=$(git -C "$repo" describe --always --dirty=+changes 2>/dev/null ||
  echo "${PBS_COMMIT:-unknown}")
logs=$(realpath -m "${OUT:-$build/logs}")
attention=$build/gpu_tests/check_attention
results=$out/gpu_attention.json
mkdir -p "$out" "$logs"
say() { printf '== %s (%s s)\n' "$*" "$SECONDS" >&2; }

wrong=0
facts=() # arguments of suite.py: what was found, and what to keep away from
found() {
  say "$1: $2"
  facts+=(--check "$1: $2")
}

build_kernels() {
  timeout -k 5 60 cmake -S "$repo/kernels" -B "$build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DPBS_CPU=OFF -DPBS_CUDA=ON -DPBS_CUDA_VARIANTS=ON \
    -DPBS_WERROR=OFF && timeout -k 5 200 ninja -C "$build"
}

count() { grep -c "$1" "$2" || true; }

# check_family NAME HEAD_DIM|none SECONDS ARGUMENTS: a process that a case ends is followed
# by one that begins behind that case. HEAD_DIM has other kernels, should these end one.
check_family() {
  local name=$1 head_dim=$2 end=$((SECONDS + $3)) said=$logs/gpu_check.part
  local begun=0 right=0 ended=0 status=0
  shift 3
  while [ "$SECONDS" -lt "$end" ]; do
    status=0
    timeout -k 2 $((end - SECONDS)) "$attention" --case-seconds 12 --skip "$begun" "$@" \
      >"$said" 2>>"$logs/gpu_check.err" || status=$?
    cat "$said" >>"$logs/gpu_check.jsonl"
    right=$((right + $(count '"right": true' "$said")))
    begun=$((begun + $(count '"begin"' "$said")))
    # 124, 137: the family's time is over, whatever ran.
    case $status in 0 | 1 | 124 | 137) break ;; esac
    grep -q '"begin"' "$said" || break
    ended=$((ended + 1))
    echo "$name: status $status in $(grep '"begin"' "$said" | tail -1)" |
      tee -a "$logs/gpu_check.err" >&2
  done
  rm -f "$said"
  local unfinished=""
  case $status in 0 | 1) ;; *) unfinished=", not all checked (status $status)" ;; esac
  found "$name" "$right of $begun cases right, $ended ended the process$unfinished"
  # The case that was running when the time was over is neither right nor wrong.
  [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || begun=$((begun - 1))
  [ "$right" -ge "$begun" ] || wrong=1
  [ "$ended" -eq 0 ] || [ "$head_dim" = none ] || facts+=(--ampere "$head_dim")
}

# A few cases of each kind of kernel: instrumented they take long.
sanitize() {
  local log=$logs/gpu_sanitizer.log status=0 only
  local cases=()
  for only in pbs_bf16_d128_h4x2 pbs_f16_d64_h4x2 mean_pooling_bf16_d96 dense_f16_d256; do
    cases+=(--only "$only")
  done
  timeout -k 5 45 compute-sanitizer --error-exitcode 9 --report-api-errors no \
    "$attention" --random 0 "${cases[@]}" >"$log" 2>&1 || status=$?
  if grep -qi "device not supported" "$log"; then
    found compute-sanitizer "not checked, it does not support this device"
  elif grep -q "^========= Invalid\|ERROR SUMMARY: [1-9]" "$log"; then
    found compute-sanitizer "ERRORS, see gpu_sanitizer.log"
    wrong=1
  elif [ "$status" -le 1 ] && grep -q "ERROR SUMMARY: 0 errors" "$log"; then
    found compute-sanitizer "$(count '"case"' "$log") cases without errors"
  else
    found compute-sanitizer \
      "not checked, status $status after $(count '"case"' "$log") cases without errors"
  fi
}

# suite.py ends with a call that hangs or faults; the next one carries on without it.
time_beside_peers() {
  local attempt status=1 left
  rm -f "$results"
  for attempt in 1 2 3 4 5 6; do
    left=$((seconds_max - SECONDS))
    [ "$left" -gt 30 ] || break
    status=0
    PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=1 timeout -k 5 "$left" \
      python3 "$repo/tests/gpu/suite.py" --library "$build/gpu_tests/libpbs_gpu_python.so" \
      --out "$results" --seconds $((left - 15)) --commit "$commit" "${facts[@]}" 2>&1 |
      tee -a "$logs/gpu_suite.log" || status=$?
    case $status in 0 | 3 | 124 | 137) break ;; esac
    [ -e "$results" ] || break
    say "attempt $attempt ended with status $status"
  done
  case $status in
    0) ;;
    124 | 137) say "not everything was timed" ;;
    *) wrong=1 ;;
  esac
}

say "the machine"
timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv ||
  say "nvidia-smi says nothing"
rm -f "$logs"/gpu_{check.jsonl,check.err,sanitizer.log,suite.log}
say "building"
if ! build_kernels >"$logs/gpu_build.log" 2>&1; then
  tail -40 "$logs/gpu_build.log"
  exit 1
fi

say "against the reference"
check_family "Hopper, head dim 128" 128 35 --random 80 --only _d128_
check_family "Hopper, head dim 64" 64 35 --random 80 --only _d64_
check_family "sm_80, head dims 96 and 256" none 35 --random 80 --only _d96_ --only _d256_
check_family "sm_80, head dims 64 and 128" none 35 --random 20 --variant ampere \
  --only _d64_ --only _d128_
if command -v compute-sanitizer >/dev/null; then
  sanitize
else
  found compute-sanitizer "not checked, it is not there"
fi
if [ "$wrong" -ne 0 ]; then
  grep -h '"right": false\|"error"' "$logs/gpu_check.jsonl" | head -20 || true
  say "WRONG RESULTS: the timings below are of wrong kernels"
fi

say "beside the peers"
time_beside_peers
say "done"
exit "$wrong"
