#!/usr/bin/env bash
# One run on a machine with a GPU: builds the kernels alone, checks them, times them
# beside their peers. Under nine minutes; no network, no gRPC: nvcc, CMake, ninja, and a
# Python with torch and triton.
#
#   scripts/gpu_suite.sh              results to docs/results/gpu_attention.json
#   OUT=FOLDER scripts/gpu_suite.sh   results, and what each part said, to FOLDER
#
# PBS_GPU_SECONDS: what the timings may take (default 300). PBS_COMMIT: what the results
# name where there is no git.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${OUT:-$repo/docs/results}")
build=$(realpath -m "${PBS_BUILD_DIR:-$repo/build-gpu}")
commit=$(git -C "$repo" describe --always --dirty=+changes 2>/dev/null ||
  echo "${PBS_COMMIT:-unknown}")
logs=$(realpath -m "${OUT:-$build/logs}")
mkdir -p "$out" "$logs"
say() { printf '== %s (%s s)\n' "$*" "$SECONDS" >&2; }

say "the machine"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv
say "building"
build_kernels() {
  cmake -S "$repo/kernels" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DPBS_CPU=OFF -DPBS_CUDA=ON -DPBS_CUDA_TUNING=ON &&
    ninja -C "$build"
}
if ! build_kernels >"$logs/gpu_build.log" 2>&1; then
  tail -40 "$logs/gpu_build.log"
  exit 1
fi

say "against the reference"
wrong=0
timeout 90 "$build/gpu_tests/check_attention" --random 40 >"$logs/gpu_check.jsonl" || wrong=1
tail -1 "$logs/gpu_check.jsonl"
timeout 60 "$build/gpu_tests/check_attention" --random 10 --ampere-kernels \
  >"$logs/gpu_check_ampere.jsonl" || wrong=1
tail -1 "$logs/gpu_check_ampere.jsonl"
if command -v compute-sanitizer >/dev/null; then
  say "compute-sanitizer"
  timeout 60 compute-sanitizer --error-exitcode 3 \
    "$build/gpu_tests/check_attention" --random 0 >"$logs/gpu_sanitizer.log" 2>&1 ||
    { tail -5 "$logs/gpu_sanitizer.log" && wrong=1; }
fi
if [ "$wrong" -ne 0 ]; then
  grep -h '"right": false\|"error"' "$logs"/gpu_check*.jsonl | head -20 || true
  say "WRONG RESULTS: the timings below are of wrong kernels"
fi

say "beside the peers"
PYTHONUNBUFFERED=1 timeout $((${PBS_GPU_SECONDS:-300} + 60)) \
  python3 "$repo/tests/gpu/suite.py" --library "$build/gpu_tests/libpbs_gpu_python.so" \
  --out "$out/gpu_attention.json" --seconds "${PBS_GPU_SECONDS:-300}" --commit "$commit" ||
  wrong=1
say "done"
exit "$wrong"
