#!/usr/bin/env bash
# Proves the README's two commands on a fresh machine: a bare Debian (mmdebstrap), a clone
# of the committed tree, nothing else. Then times a second quickstart. What was proven goes
# to docs/results/fresh_SUITE.json. Some 30 minutes on 2 cores, half of them the first
# quickstart.
#
#   scripts/fresh_machine.sh [SUITE]    a Debian suite: trixie (default) or bookworm
#
# FRESH_CCACHE=DIR hands in a compiler cache. The machine is not bare then, and the result
# has no times.
#
# Needs root (for the chroot's mounts), a package mirror, and a Python package index. The
# host's pip settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CERT) are handed in.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

suite=${1:-trixie}
[ "$(id -u)" -eq 0 ] || fail "a chroot with mounts needs root"
install_packages mmdebstrap git

work=$(mktemp -d)
root=$work/root
# Nothing is removed while a folder of the host is still mounted there.
clean_up() {
  ! mountpoint -q "$root" || umount -lR "$root"
  ! mountpoint -q "$root" || fail "$root is still mounted; its folders stay"
  rm -rf --one-file-system "$work"
}
trap clean_up EXIT

say "a bare $suite"
mmdebstrap --quiet --variant=minbase "$suite" "$root"
git clone -q "$repo" "$root/srv/checkout"
commit=$(git -C "$root/srv/checkout" rev-parse HEAD)
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind -o ro /sys "$root/sys"
cp /etc/resolv.conf "$root/etc/resolv.conf"

# The way to the Python package index, as the host has it.
settings=()
[ -z "${PIP_INDEX_URL:-}" ] || settings+=("PIP_INDEX_URL=$PIP_INDEX_URL")
if [ -d "${PIP_FIND_LINKS:-}" ]; then
  mkdir -p "$root/wheels"
  mount --bind -o ro "$PIP_FIND_LINKS" "$root/wheels"
  settings+=(PIP_FIND_LINKS=/wheels)
fi
if [ -f "${PIP_CERT:-}" ]; then
  cp "$PIP_CERT" "$root/etc/package-index.crt"
  settings+=(PIP_CERT=/etc/package-index.crt)
fi

if [ -n "${FRESH_CCACHE:-}" ]; then
  mkdir -p "$root/srv/ccache"
  mount --bind "$FRESH_CCACHE" "$root/srv/ccache"
  settings+=(CCACHE_DIR=/srv/ccache)
fi

inside() {
  chroot "$root" env -i HOME=/root LANG=C.UTF-8 "${settings[@]}" \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    bash -euc "cd /srv/checkout && $1"
}
log=$work/log times=
timed() { # timed TITLE COMMAND
  local begin=$SECONDS
  say "$1"
  inside "$2" 2>&1 | tee -a "$log"
  times+="$1"$'\t'$((SECONDS - begin))$'\n'
}
timed "scripts/quickstart.sh" scripts/quickstart.sh
timed "scripts/quickstart.sh, second run" scripts/quickstart.sh
timed "scripts/test.sh" scripts/test.sh
say "both commands work on a bare $suite"
printf '%s' "$times"

# shellcheck disable=SC2016  # ${...} is dpkg-query's
versions=$(inside 'dpkg-query -W -f="\${Package}\t\${Version}\n" \
  cmake g++ libabsl-dev libdnnl-dev libgrpc++-dev libmicrohttpd-dev libprotobuf-dev \
  libtbb-dev python3')
[ -z "${FRESH_CCACHE:-}" ] || times=
PBS_BENCH_COMMAND="scripts/fresh_machine.sh $suite" PYTHONPATH="$repo/tests/bench" \
  python3 - "$suite" "$commit" "$log" "$versions" "$times" <<'PYTHON'
import pathlib
import re
import sys

from bench_common import run_header, write_results

suite, commit, log, versions, times = sys.argv[1:]
text = pathlib.Path(log).read_text()
# ctest's sum and pytest's, one each, or the proof is none.
(ctest,) = re.findall(r"^\d+% tests passed, 0 tests failed out of \d+$", text, re.M)
(pytest,) = re.findall(r"^\d+ passed.*?(?= in )", text, re.M)
write_results(
    f"fresh_{suite}",
    {**run_header(), "commit": commit},
    {
        "packages": dict(line.split("\t") for line in versions.splitlines()),
        "decoded": re.findall(r"^right: .*$", text, re.M),
        "ctest": ctest,
        "pytest": pytest,
        "warnings": len(re.findall(r"\bwarning: ", text)),
        "compiler_cache": not times,
        "seconds": {
            title: int(seconds)
            for title, seconds in (line.split("\t") for line in times.splitlines())
        },
    },
)
PYTHON
