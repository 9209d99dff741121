#!/usr/bin/env bash
# What can be shown of the CUDA kernels without a GPU, beyond the emulator's tests (which
# ctest runs): planted defects are caught, and the compiler made what was planned.
#
#   scripts/check_cuda.sh [--without-nvcc]
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

install_packages "${build_packages[@]}" python3-venv
build_targets pbs_emulator pbs_kernels pbs_reference pbs_cuda_plan
say "planted defects"
python3 "$repo/tests/emulator/check_mutants.py" --jobs "$jobs" --build "$build_dir"
[ "${1:-}" = --without-nvcc ] && exit 0

command -v nvcc >/dev/null || fail "there is no nvcc: install the CUDA toolkit 13, or
run scripts/check_cuda.sh --without-nvcc"
environment=$build_dir/cuobjdump
[ -x "$environment/bin/python" ] || python3 -m venv "$environment"
# The second is what the first calls, beside itself.
"$environment/bin/pip" install -q "nvidia-cuda-cuobjdump>=13,<14" "nvidia-cuda-nvdisasm>=13,<14"
cuobjdump=$(find "$environment" -name cuobjdump -type f | head -1)
say "machine code of the kernels"
python3 "$repo/scripts/check_cuda_build.py" --cuobjdump "$cuobjdump" --jobs "$jobs"
