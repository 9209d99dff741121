#!/usr/bin/env bash
# What scripts/gpu_server_suite.sh needs on a machine with a GPU and no network, in one
# folder to bring along with the tree (some 40 MB):
#
#   scripts/pack_gpu_suite.sh            to build/gpu-suite
#
#   pbs-prefill-*.tar.xz   scripts/package.sh, with the CUDA module
#   bench_worker           times linear layers through the module
#   tiny-models/           models with what transformers computes from them
#   wheels/                of the Python client and pytest, for CPython 3.12 on x86-64
#
# PYTHON: one with torch, transformers and pip (default: .venv, as scripts/test.sh --peers
# makes it). The package and bench_worker are of the build in PBS_BUILD_DIR, and of one
# compiler: a module of another build is refused.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

megabytes_max=45 # of 64 MiB, the tree takes 18
models=(llama3 qwen3 qwen3-tied-bias)
wheels=(grpcio protobuf google-crc32c ml_dtypes typing_extensions
  pytest pluggy iniconfig packaging pygments)
python=${PYTHON:-$repo/.venv/bin/python}
[ -x "$python" ] || fail "there is no $python: run scripts/test.sh --peers, or set PYTHON"
folder=$build_dir/gpu-suite
rm -rf "$folder"
mkdir -p "$folder"

"$repo/scripts/package.sh"
[ -e "$build_dir/lib/libpbs_cuda.so" ] || fail "the package has no CUDA module"
cp "$build_dir"/pbs-prefill-*.tar.xz "$folder/"
build_targets bench_worker
strip -o "$folder/bench_worker" "$build_dir/bin/bench_worker"
say "tiny models"
"$python" "$repo/scripts/make_tiny_models.py" --out "$folder/tiny-models" \
  --only "${models[@]}" >/dev/null
say "wheels"
"$python" -m pip download -q --only-binary=:all: --no-deps --python-version 3.12 \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
  -d "$folder/wheels" "${wheels[@]}"
megabytes=$(($(du -sb "$folder" | cut -f1) >> 20))
[ "$megabytes" -le "$megabytes_max" ] || fail "$megabytes MiB, more than $megabytes_max"
say "$folder, $megabytes MiB"
