#!/usr/bin/env bash
# One run of a served model on a machine with a GPU, from the package: the authors'
# outputs and models through the server, a cache handed to pbs-decode, linear layers and
# whole prefills beside torch's. Nine minutes at most. The machine needs no network, no
# compiler and no gRPC: python3 with torch, numpy and safetensors, and cuBLASLt, which
# torch's pip packages bring along.
#
#   PBS_PACKAGE=build/gpu-suite OUT=FOLDER scripts/gpu_server_suite.sh
#
# PBS_PACKAGE: the folder of scripts/pack_gpu_suite.sh, made where a server can be built:
# the package (its tar, or unpacked), bench_worker, tiny models, the wheels of the Python
# client and pytest for CPython 3.12. Bring it along with the tree. Default:
# build/gpu-suite.
# OUT: results (gpu_server.json) and what each part said; default docs/results and
# build-gpu/logs. scripts/gpu_report.py writes the tables.
# PBS_GPU_SECONDS: what all of it may take (default 530); the times to first token get
# what the parts before leave, prompts at once what is left then. PBS_COMMIT: what the results name where there is no git.
# PBS_CUBLASLT: the file of cuBLASLt, where torch has none.
# PBS_SUITE_LAYERS: of the model in the shape of Llama-3.1-8B; default all 32, or as many
# as there is room for in /dev/shm or TMPDIR; the results say how many.
#
# Each part is a process group of its own with a time limit: one that hangs, crashes or is
# killed costs its own results only. Exit status 1 when something is wrong, not when
# something could not be checked.
#
# For its own tests: PBS_SUITE_BACKEND (cpu; or cuda with an emulated module in
# PBS_SUITE_SERVER_FLAGS), PBS_SUITE_MODEL (arguments of scripts/make_random_model.py),
# PBS_SUITE_LENGTHS, PBS_SUITE_ARGUMENTS (of tests/gpu/server_suite.py), PBS_SUITE_PARTS,
# PYTHON. gpu_report.py refuses results that are not of a GPU.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
seconds_max=${PBS_GPU_SECONDS:-530}
package=$(realpath -m "${PBS_PACKAGE:-$repo/build/gpu-suite}")
out=$(realpath -m "${OUT:-$repo/docs/results}")
logs=$(realpath -m "${OUT:-$repo/build-gpu/logs}")
export PBS_TEST_BACKEND=${PBS_SUITE_BACKEND:-cuda}
export PBS_TEST_SERVER_FLAGS=${PBS_SUITE_SERVER_FLAGS:-}
python=${PYTHON:-python3}
layers=${PBS_SUITE_LAYERS:-32}
lengths=${PBS_SUITE_LENGTHS:-32768 131072 8192 16384 65536} # the goals' two first
commit=$(git -C "$repo" describe --always --dirty=+changes 2>/dev/null ||
  echo "${PBS_COMMIT:-unknown}")
say() { printf '== %s (%s s)\n' "$*" "$SECONDS" >&2; }

work=$(mktemp -d)
models="" group="" # of the part that runs
# shellcheck disable=SC2317 # a trap calls it
end() {
  [ -z "$group" ] || kill -KILL -- "-$group" 2>/dev/null || true
  rm -rf "$work" ${models:+"$models"}
}
trap end EXIT
trap 'exit 1' INT TERM
parts=$work/parts
mkdir -p "$out" "$logs" "$parts"
rm -f "$out/gpu_server.json" "$logs"/server_*.log
wrong=0

# Writes what is there so far to the results file.
collect() { # [ARGUMENT...]
  timeout 60 "$python" "$repo/tests/gpu/collect.py" --parts "$parts" \
    --out "$out/gpu_server.json" --commit "$commit" --seconds "$SECONDS" "$@" ||
    say "the results could not be written"
}

# run_part NAME SECONDS COMMAND...: in a group of its own, of which nothing is left behind.
# Its status: 0 right, 3 wrong, 4 lost a server, 124 was out of time.
run_part() {
  local name=$1 limit=$2 left=$((seconds_max - SECONDS - 10)) begin=$SECONDS status=0
  local said
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    say "$name: left out, no time"
    collect --status "$name: left out, no time"
    return 5
  fi
  say "$name, $limit s at most"
  setsid timeout --foreground -k 5 "$limit" "$@" > >(tee -a "$logs/server_$name.log" >&2) 2>&1 &
  group=$!
  wait "$group" || status=$?
  kill -KILL -- "-$group" 2>/dev/null || true # a server that its part left behind
  group=""
  case $status in
    0) said="right" ;;
    3) said="WRONG" wrong=1 ;;
    124 | 137) said="not finished in $limit s" ;;
    *) said="not finished, status $status" ;;
  esac
  say "$name: $said"
  case $said in not*) tail -3 "$logs/server_$name.log" >&2 ;; esac
  collect --status "$name: $said, $((SECONDS - begin)) s"
  return "$status"
}

unpack() {
  local file version
  mkdir -p "$work/python"
  version=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  for file in "$package"/wheels/*.whl; do
    case $file in
      *-none-any.whl | *-abi3-* | *-"$version"-*) "$python" -m zipfile -e "$file" "$work/python" ;;
    esac
  done
  for file in "$package"/pbs-prefill-*; do
    if [ -d "$file" ]; then
      cp -rs "$file" "$work/"
    else
      "$python" -m tarfile -e "$file" "$work" # there may be no xz
    fi
  done
  mv "$work"/pbs-prefill-* "$work/package"
  [ ! -e "$package/bench_worker" ] || cp "$package/bench_worker" "$work/package/bin/"
}

find_cublaslt() {
  "$python" - <<'EOF'
import pathlib, sys
for folder in map(pathlib.Path, sys.path):
    for found in sorted(folder.glob("nvidia/**/libcublasLt.so.13")):
        print(found)
        raise SystemExit
EOF
}

# The first folder with room for the whole model, or the one for most of its layers: 437
# MB each, beside embedding and head (2.1 GB) and a reserve.
place_model() {
  local folder free fits most=0 where=""
  for folder in /dev/shm "${TMPDIR:-/tmp}"; do
    [ -w "$folder" ] || continue
    free=$(df --output=avail -BM "$folder" | tail -1 | tr -dc 0-9)
    fits=$(((free - 4000) / 437))
    [ "$fits" -le "$layers" ] || fits=$layers
    [ "$fits" -gt "$most" ] || continue
    most=$fits where=$folder
  done
  [ "$most" -gt 0 ] || return 1
  layers=$most
  models=$(mktemp -d -p "$where")
  collect --model-folder "$where"
}

make_model() {
  local big="--preset llama-3.1-8b --torch cuda --shard-size 2GB --layers $layers"
  # shellcheck disable=SC2086  # words
  run_part model 90 "$python" "$repo/scripts/make_random_model.py" --out "$models/big" \
    ${PBS_SUITE_MODEL:-$big}
}

suite() { # PART SECONDS ARGUMENT...
  local part=$1 limit=$2 left=$((seconds_max - SECONDS - 10))
  shift 2
  case " ${PBS_SUITE_PARTS:-tests handoff linear ttft concurrent} " in
    *" $part "*) ;;
    *) return 0 ;;
  esac
  [ "$limit" -le "$left" ] || limit=$left # the part must know, too
  # shellcheck disable=SC2086  # words
  run_part "$part" "$limit" "$python" -u "$repo/tests/gpu/server_suite.py" "$part" \
    --out "$parts/$part.json" --seconds "$((limit - 10))" ${PBS_SUITE_ARGUMENTS:-} "$@" ||
    return
}

# A prompt that ends the server is not begun again: the next process carries on behind it.
time_prefills() {
  local attempt status=0 left
  for attempt in 1 2 3; do
    left=$((seconds_max - SECONDS - 15))
    [ "$left" -gt 20 ] || break
    status=0
    suite ttft "$left" --model "$models/big" --lengths "$lengths" || status=$?
    case $status in 0 | 3 | 5 | 124 | 137) break ;; esac
    [ -e "$parts/ttft.json" ] || break
    say "attempt $attempt ended with status $status"
  done
}

say "the machine"
collect
say "unpacking"
unpack
cublaslt=${PBS_CUBLASLT:-$(find_cublaslt)}
[ -z "$cublaslt" ] || PBS_TEST_SERVER_FLAGS+=" --set cuda.cublaslt=$cublaslt"
export PBS_BIN=$work/package/bin PBS_TINY_MODELS=$package/tiny-models
export PYTHONPATH=$work/python:$repo/client/python

say "what is right"
suite tests 110 || true
suite handoff 40 || true
say "what is fast"
suite linear 50 --cublaslt "$cublaslt" || true
if ! place_model; then
  collect --status "model: no folder has room for it"
elif make_model; then
  time_prefills
  suite concurrent 70 --model "$models/big" || true
fi
collect --done
say "done"
exit "$wrong"
