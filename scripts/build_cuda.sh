#!/usr/bin/env bash
# Builds libpbs_cuda.so, what a server needs to run on a GPU, into build/lib, where
# build/bin/pbs-prefilld looks for it. Needs nvcc 13; cuBLASLt's header comes from the
# toolkit or, where that has none, from PyPI. No GPU is needed to build. What the compiler
# says of each kernel is in build/cuda/build.log.
#
#   scripts/build_cuda.sh
#   build/bin/pbs-prefilld --backend cuda --model NAME=FOLDER
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

command -v nvcc >/dev/null || fail "there is no nvcc: install the CUDA toolkit 13"
install_packages g++ cmake ninja-build python3-venv
options=(-DPBS_CPU=OFF -DPBS_CUDA=ON -DCMAKE_BUILD_TYPE=Release "-DPBS_WERROR=${PBS_WERROR:-OFF}")
toolkit=$(dirname "$(dirname "$(nvcc --dryrun none.cu 2>&1 | sed -n 's/.*_HERE_=//p')")")
if [ ! -e "$toolkit/include/cublasLt.h" ]; then
  environment=$build_dir/cublas
  [ -x "$environment/bin/python" ] || python3 -m venv "$environment"
  "$environment/bin/pip" install -q --no-deps "nvidia-cublas>=13,<14"
  header=$(find "$environment" -name cublasLt.h | head -1)
  [ -n "$header" ] || fail "there is no cublasLt.h in the toolkit and none from PyPI"
  options+=("-DPBS_CUBLAS_INCLUDE=$(dirname "$header")")
fi
say "building libpbs_cuda.so (a minute or two)"
log=$build_dir/cuda_configure.log
cmake -S "$repo/kernels" -B "$build_dir/cuda" -G Ninja "${options[@]}" >"$log" 2>&1 || {
  tail -20 "$log" >&2
  fail "configuring failed; the whole log is $log"
}
ninja -C "$build_dir/cuda" -j "$jobs" >"$build_dir/cuda/build.log" 2>&1 || {
  tail -40 "$build_dir/cuda/build.log" >&2
  fail "building failed; the whole log is $build_dir/cuda/build.log"
}
mkdir -p "$build_dir/lib"
cp "$build_dir/cuda/lib/libpbs_cuda.so" "$build_dir/lib/"
say "built $build_dir/lib/libpbs_cuda.so"
