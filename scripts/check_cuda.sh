#!/usr/bin/env bash
# What can be shown of the CUDA kernels without a GPU, beyond the emulator's tests (which
# ctest runs): planted defects are caught, and the compiler made what was planned.
#
#   scripts/check_cuda.sh [--without-nvcc]
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

install_packages "${build_packages[@]}" python3-venv
build_targets pbs_emulator pbs_kernels pbs_reference pbs_cuda_plan pbs-prefilld
if [ "${1:-}" != --without-nvcc ]; then
  command -v nvcc >/dev/null || fail "there is no nvcc: install the CUDA toolkit 13, or
run scripts/check_cuda.sh --without-nvcc"
  rm -rf "$build_dir/cuda"  # what the compiler says, it says once
  # Beside the defects: a core idles while nvcc is at its largest source.
  "$repo/scripts/build_cuda.sh" &
  module_build=$!
  trap 'kill "$module_build" 2>/dev/null' EXIT
fi
say "planted defects"
python3 "$repo/tests/emulator/check_mutants.py" --jobs "$jobs" --build "$build_dir"
[ "${1:-}" = --without-nvcc ] && exit 0

wait "$module_build" || fail "libpbs_cuda.so could not be built"
trap - EXIT
module=$build_dir/lib/libpbs_cuda.so
environment=$build_dir/cuobjdump
[ -x "$environment/bin/python" ] || python3 -m venv "$environment"
# The second is what the first calls, beside itself.
"$environment/bin/pip" install -q "nvidia-cuda-cuobjdump>=13,<14" "nvidia-cuda-nvdisasm>=13,<14"
cuobjdump=$(find "$environment" -name cuobjdump -type f | head -1)
say "programs for a GPU, with every variant of the kernels"
programs=$build_dir/gpu-check
rm -rf "$programs" "$programs-build"
"$repo/scripts/pack_gpu.sh" --programs "$programs"
say "machine code of the kernels"
python3 "$repo/tests/structure/check_cuda_build.py" --module "$module" \
  --log "$build_dir/cuda/build.log" --variants "$programs-build.log" --cuobjdump "$cuobjdump"
say "libpbs_cuda.so in a server"
needed=$(readelf -d "$module" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p')
if grep -E "cuda|cublas|nvidia" <<<"$needed"; then
  fail "libpbs_cuda.so must not need a CUDA library to be loaded"
fi
exported=$(nm -D --defined-only "$module" | awk '$2 == "T" { print $3 }' | sort | xargs)
[ "$exported" = "pbs_cuda_create pbs_cuda_device_count pbs_cuda_interface_id" ] ||
  fail "libpbs_cuda.so exports $exported"
if nvidia-smi >/dev/null 2>&1; then
  say "there is a GPU: its part is tests/gpu/run.py"
  exit
fi
refused=$("$build_dir/bin/pbs-prefilld" --backend cuda --metrics-listen off 2>&1) &&
  fail "--backend cuda started without a device"
grep -q "backend cuda: CUDA sees no device" <<<"$refused" ||
  fail "--backend cuda does not say that there is no device: $refused"
chosen=$(timeout -s TERM 20 "$build_dir/bin/pbs-prefilld" --listen 127.0.0.1:0 \
  --metrics-listen off 2>&1 >/dev/null | grep -m1 backend_auto || true)
grep -q '"backend":"cpu","reason":"CUDA sees no device' <<<"$chosen" ||
  fail "--backend auto does not say why it took the CPU: $chosen"
say "without a device: cuda refuses, auto takes the CPU"
