#!/usr/bin/env bash
# Fuzzes every parser with libFuzzer, ASan and UBSan.
#
#   scripts/fuzz.sh [SECONDS]   per target, one on each CPU at a time; default 60
#
# New inputs that reach new code stay in the build folder (PBS_SANITIZE_DIR, as
# scripts/sanitize.sh has it), crashes in its found/: make each a named case of the
# target's corpus.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
seconds=${1:-60}
build_dir=$(realpath -m "${PBS_SANITIZE_DIR:-$repo/build-asan}")
cd "$repo"

install_packages "${build_packages[@]}" "${clang_packages[@]}"
cmake --preset asan -B "$build_dir" >/dev/null
say "building the fuzz targets"
ninja -C "$build_dir" -j "$jobs" fuzzers >&2
mapfile -t targets < <(cd "$build_dir/bin" && ls -d fuzz_*)

run_one() {
  local target=$1 work=$build_dir/corpus/$1
  mkdir -p "$work" "$build_dir/found"
  "$build_dir/bin/$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 \
    -artifact_prefix="$build_dir/found/$target-" -print_final_stats=1 \
    "$work" "$repo/tests/fuzz/corpus/${target#fuzz_}" >"$build_dir/$target.log" 2>&1 ||
    { tail -30 "$build_dir/$target.log" && return 1; }
  grep -E 'stat::(number_of_executed_units|average_exec_per_sec)' "$build_dir/$target.log" |
    sed "s/^stat::/$target /"
}
export -f run_one
export build_dir seconds repo

say "fuzzing ${#targets[@]} targets, $seconds s each, $jobs at a time"
printf '%s\n' "${targets[@]}" | xargs -P "$jobs" -I{} bash -c 'run_one {}' ||
  fail "a target failed; inputs are in $build_dir/found"
say "no target failed"
