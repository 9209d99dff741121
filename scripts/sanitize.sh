#!/usr/bin/env bash
# Runs the C++ tests under a sanitizer.
#
#   scripts/sanitize.sh address   AddressSanitizer and UndefinedBehaviorSanitizer, all tests
#   scripts/sanitize.sh thread    ThreadSanitizer, the core that does not use gRPC (its
#                                 uninstrumented library reports hundreds of false alarms)
#
# PBS_SANITIZE_DIR chooses the build folder (default: build-asan, build-tsan).
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

install_packages "${build_packages[@]}"
case ${1:-} in
  address)
    preset=asan labels='unit|integration' target=test_programs
    install_packages "${clang_packages[@]}"
    ;;
  thread) preset=tsan labels='tsan' target=tsan_tests ;;
  *) fail "usage: $0 address|thread" ;;
esac
build_dir=$(realpath -m "${PBS_SANITIZE_DIR:-$repo/build-$preset}")
cd "$repo"
say "configuring and building $build_dir"
cmake --preset "$preset" -B "$build_dir" >/dev/null
ninja -C "$build_dir" -j "$jobs" "$target" >&2
say "tests under $1 sanitizer"
ctest --test-dir "$build_dir" --output-on-failure -j "$jobs" -L "$labels"
