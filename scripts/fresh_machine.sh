#!/usr/bin/env bash
# Proves the README's two commands on a fresh machine: a bare Debian 12 (mmdebstrap), a
# clone of the committed tree, nothing else. Then times a second quickstart. Some 30
# minutes on 2 cores, half of them the first quickstart.
#
#   scripts/fresh_machine.sh [SUITE]    a Debian suite; default bookworm
#
# Needs root (for the chroot's mounts), a package mirror, and a Python package index. The
# host's pip settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CERT) are handed in.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

suite=${1:-bookworm}
[ "$(id -u)" -eq 0 ] || fail "a chroot with mounts needs root"
install_packages mmdebstrap git

work=$(mktemp -d)
root=$work/root
trap 'umount -lR "$root" 2>/dev/null || true; rm -rf --one-file-system "$work"' EXIT

say "a bare $suite"
mmdebstrap --quiet --variant=minbase "$suite" "$root"
git clone -q "$repo" "$root/srv/checkout"
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

inside() {
  chroot "$root" env -i HOME=/root LANG=C.UTF-8 "${settings[@]}" \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    bash -euc "cd /srv/checkout && $1"
}
timed() { # timed TITLE COMMAND
  local begin=$SECONDS
  say "$1"
  inside "$2"
  times+="$1: $((SECONDS - begin)) s"$'\n'
}
times=
timed "scripts/quickstart.sh" scripts/quickstart.sh
timed "scripts/quickstart.sh, second run" scripts/quickstart.sh
timed "scripts/test.sh" scripts/test.sh
say "both commands work on a bare $suite"
printf '%s' "$times"
