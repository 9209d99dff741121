#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test that needs no heavy peer.
#
#   scripts/test.sh            C++ tests, Python client tests, structure checks
#   scripts/test.sh --peers    also the tests against torch, transformers and lm_eval
#   scripts/test.sh --no-python  C++ only (no package index needed)
#
# PBS_BUILD_DIR chooses the build folder (default: build).
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

peers=false python=true
for argument in "$@"; do
  case $argument in
    --peers) peers=true ;;
    --no-python) python=false ;;
    *) fail "unknown argument $argument; see the first lines of $0" ;;
  esac
done

# Files of tests side by side, each with servers of its own.
beside=(-n 2 --dist loadfile)

install_packages "${build_packages[@]}"
build_targets all

say "C++ tests and structure checks"
ctest --test-dir "$build_dir" --output-on-failure -j "$jobs"

if $python; then
  python_environment "$repo/.venv" pytest pytest-xdist h2 "$repo/client/python[gateway]"
  say "Python client tests"
  PBS_PREFILLD=$build_dir/bin/pbs-prefilld PBS_BIN=$build_dir/bin \
    "$repo/.venv/bin/python" -m pytest -q "${beside[@]}" "$repo/tests/python" \
    -m "not peers and not vllm"
fi

if $peers; then
  python_environment "$repo/.venv" pytest pytest-xdist h2 matplotlib vllm-router==0.1.17 \
    "$repo/client/python[gateway]" "lm_eval[hf,longbench]>=0.4.13" "${peer_packages[@]}"
  say "tests against torch and transformers"
  PBS_PREFILLD=$build_dir/bin/pbs-prefilld PBS_BIN=$build_dir/bin \
    "$repo/.venv/bin/python" -m pytest -q "${beside[@]}" "$repo/tests/python" -m peers
fi
say "all tests passed"
