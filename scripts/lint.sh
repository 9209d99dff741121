#!/usr/bin/env bash
# Layout and lint checks, nothing changed on disk.
#
#   scripts/lint.sh          clang-format, shellcheck, yamllint, ruff, structure checks
#   scripts/lint.sh --tidy   also clang-tidy over every source, and its include cleaner
#                            over headers too (some twenty minutes)
#   scripts/lint.sh --fix    reformats C++ in place instead
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"
cd "$repo"

install_packages clang-format-16 shellcheck yamllint python3
mapfile -t sources < <(git ls-files '*.h' '*.cc' '*.cu' '*.inc')
if [ "${1:-}" = --fix ]; then
  clang-format-16 -i "${sources[@]}"
  exit
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
  client/python scripts tests
say "structure and documentation"
python3 tests/structure/check_includes.py
python3 tests/structure/check_structure.py
python3 tests/structure/check_docs.py

if [ "${1:-}" = --tidy ]; then
  install_packages clang-tidy-16
  build_targets pbs_proto
  say "clang-tidy over $(printf '%s\n' "${sources[@]}" | grep -c '\.cc$') files"
  printf '%s\n' "${sources[@]}" | grep -E '^(kernels|server|client|proto/wire)/.*\.cc$' |
    grep -v tile_kernels_ | xargs -P "$jobs" -n 4 clang-tidy-16 -p "$build_dir" --quiet
  # clang-tidy 16 has no include cleaner. Device code and kernels of one instruction set
  # choose their headers by other rules (their own first lines).
  say "include cleaner"
  "$build_dir/lint-venv/bin/pip" install -q "clang-tidy>=20"
  printf '%s\n' "${sources[@]}" | grep -E '\.(h|cc)$' |
    grep -vE '^(kernels/cuda|tests/(emulator|fuzz|gpu))/|tile_kernels' |
    xargs -P "$jobs" -n 8 "$build_dir/lint-venv/bin/clang-tidy" -p "$build_dir" --quiet \
      --config-file=tests/structure/include_cleaner.yaml
fi
