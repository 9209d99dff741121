#!/usr/bin/env bash
# Proves the CPU image's file system without a container engine: runs it as the image and
# the pod do: read-only root, a small /tmp, no privileges, process 1 of its own
# namespaces. There must be no shell and no package manager in it. The server must print
# its version, accept the base's configuration, serve the bundled model on the image's
# addresses and drain on SIGTERM. It takes seconds.
#
#   scripts/check.sh image [PROGRAM]     (default: the build folder's server)
#       lays the file system out as the Dockerfile does, with this machine's libraries
#   scripts/check.sh image --root DIR
#       an image's file system, unpacked (scripts/build_image.sh)
#
# Needs root (for namespaces and mounts), and a PROGRAM built on this machine's release.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/../../scripts/common.sh"

[ "$(id -u)" -eq 0 ] || fail "namespaces and mounts need root"
work=$(mktemp -d)
# KILL: `unshare` blocks TERM while it waits, and ends its child with itself.
trap '[ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true
  rm -rf --one-file-system "$work"' EXIT
root=$work/root

if [ "${1:-}" = --root ]; then
  cp -a "$2" "$root"
else
  program=${1:-$build_dir/bin/pbs-prefilld}
  [ -x "$program" ] || fail "$program is not built"
  "$repo/deploy/runtime_root.sh" "$program" "$root"
fi
# Mode 700 of mktemp is not the image's.
chmod 755 "$work" "$root"

say "what is in it"
programs=$(find "$root" -xdev -type f -perm /111 ! -name '*.so*' -printf '/%P\n')
[ "$programs" = /usr/local/bin/pbs-prefilld ] || fail "programs: $programs"
privileged=$(find "$root" -xdev -perm /6000)
[ -z "$privileged" ] || fail "files that give privileges: $privileged"
packages=$(wc -l <"$root/usr/local/share/doc/pbs-prefill/runtime-packages")
server_size=$(du -h --apparent-size "$root/usr/local/bin/pbs-prefilld" | cut -f1)
say "$(du -sh --apparent-size "$root" | cut -f1) unpacked, libraries of $packages packages," \
  "of it the server $server_size"

# What the engine and the pod mount, and two folders for the checks.
install -D -m 644 "$repo/deploy/kustomize/base/server.json" \
  "$root/etc/pbs-prefill/server.json"
mkdir -p "$root"/{dev,models,proc,sys,tmp}
cp -r "$repo/tests/data/recall-llama" "$root/models/"
chmod -R a+rX "$root/models"

# in_image COMMAND...: as the container engine would start it. `exec` all along, so the
# command is process 1 of its namespaces and signals reach it.
in_image() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  exec unshare --mount --pid --net --ipc --uts --fork --kill-child -- bash -euc '
    root=$1
    shift
    mount --bind "$root" "$root"
    mount -t proc -o ro,nosuid,nodev,noexec proc "$root/proc"
    mount --rbind -o ro /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o size=64m,nosuid,nodev tmpfs "$root/tmp"
    mount -o remount,bind,ro "$root"
    exec setpriv --no-new-privs env -i PATH=/usr/local/bin "$(command -v unshare)" \
      --root "$root" --wd / --setgid 65532 --setuid 65532 "$@"
  ' in_image "$root" "$@"
}

say "pbs-prefilld --version"
(in_image pbs-prefilld --version)
say "pbs-prefilld --check-config"
(in_image pbs-prefilld --check-config --config /etc/pbs-prefill/server.json)

say "serving the bundled model from the image's entry point"
entry_point=$(sed -n 's/^ENTRYPOINT \[\(.*\)\]$/\1/p' "$repo/deploy/Dockerfile" | tail -1 |
  tr -d '",')
log=$work/server.log
# shellcheck disable=SC2086  # words of the entry point
start_server "$log" in_image $entry_point --backend cpu --model recall=/models/recall-llama
grep '"event":"serving"' "$log"
# The server is the one child of what made its namespaces, which ends with its status.
inner=$(cut -d' ' -f1 "/proc/$server/task/$server/children")
say "its user, privileges and root"
status=$(grep -E '^(Uid|Gid|Groups|CapPrm|CapEff|NoNewPrivs|NSpid):' "/proc/$inner/status")
echo "$status"
grep -q "^NSpid:.*[[:space:]]1$" <<<"$status" || fail "it is not process 1"
for line in Uid:65532 Gid:65532 CapPrm:0000000000000000 NoNewPrivs:1; do
  grep -q "^${line/:/:[[:space:]]*}" <<<"$status" || fail "it does not have $line"
done
awk '$5 == "/" { print "/ is", $6; ro = $6 ~ /^ro/ } END { exit !ro }' \
  "/proc/$inner/mountinfo" || fail "its root can be written"

kill -TERM "$inner"
wait "$server" || {
  cat "$log" >&2
  fail "the server did not drain on SIGTERM"
}
server=
tail -1 "$log"
say "the image has everything the server needs"
