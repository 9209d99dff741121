#!/usr/bin/env bash
# What tests/gpu/run.py needs on a machine with a GPU and no network, in one folder to
# bring along with the tree:
#
#   scripts/pack_gpu.sh                     to build/gpu
#   scripts/pack_gpu.sh --programs FOLDER   the programs over CUDA alone, built there
#
# Programs over CUDA with all variants of the kernels, the package (scripts/package.sh)
# and bench_worker of the same build, tiny models, the wheels that a Python 3.12 with torch,
# transformers and grpcio lacks, the commit, and a hash of the sources. PYTHON: one with torch, transformers and
# pip (default: .venv, as scripts/test.sh --peers makes it).
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

bytes_max=$((64 << 20)) # of the tree and the folder
programs=(check_attention{,_bounded} libpbs_gpu_python{,_bounded}.so)

build_programs() { # FOLDER
  cmake -S "$repo/kernels" -B "$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPBS_CPU=OFF \
    -DPBS_CUDA=ON -DPBS_CUDA_VARIANTS=ON >"$1.log" 2>&1 ||
    fail "configuring failed: $(tail -20 "$1.log")"
  ninja -C "$1" {check_attention,pbs_gpu_python}{,_bounded} >>"$1.log" 2>&1 ||
    fail "building failed: $(grep -A5 FAILED "$1.log" | head -40)"
}

if [ "${1:-}" = --programs ]; then
  build_programs "$2-build"
  mkdir -p "$2"
  cp "${programs[@]/#/$2-build/gpu_tests/}" "$2/"
  exit
fi

python=${PYTHON:-$repo/.venv/bin/python}
[ -x "$python" ] || fail "there is no $python: run scripts/test.sh --peers, or set PYTHON"
folder=$build_dir/gpu
rm -rf "$folder"
mkdir -p "$folder"
"$repo/scripts/package.sh"
[ -e "$build_dir/lib/libpbs_cuda.so" ] || fail "the package has no CUDA module"
cp "$build_dir"/pbs-prefill-*.tar.xz "$folder/"
say "programs over CUDA"
build_programs "$build_dir/gpu-programs"
(cd "$build_dir/gpu-programs/gpu_tests" && tar -c "${programs[@]}" | xz -T0 -6 \
  >"$folder/programs.tar.xz")
# The emulated ones are for rehearsals.
build_targets bench_worker check_attention_emulated pbs_gpu_python_emulated
strip -o "$folder/bench_worker" "$build_dir/bin/bench_worker"
say "tiny models, wheels"
"$python" "$repo/tests/models/make_tiny_models.py" --out "$folder/tiny-models" \
  --only llama3 qwen3 qwen3-tied-bias >/dev/null
"$python" -m pip download -q --only-binary=:all: --no-deps --python-version 3.12 \
  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d "$folder/wheels" \
  google-crc32c
PYTHONPATH=$repo/tests/gpu "$python" -c "import machine; print(machine.hash_sources())" \
  >"$folder/sources"
git -C "$repo" describe --always --dirty=+changes >"$folder/commit"
tree=$(git -C "$repo" ls-files -z --cached --others --exclude-standard |
  (cd "$repo" && du -cb --files0-from=- 2>/dev/null) | tail -1 | cut -f1)
packed=$(du -sb "$folder" | cut -f1)
say "$folder: $((packed >> 20)) MiB beside $((tree >> 20)) MiB of the tree"
[ $((tree + packed)) -lt $bytes_max ] || fail "more than $((bytes_max >> 20)) MiB together"
