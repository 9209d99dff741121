#!/usr/bin/env bash
# Proves the image's runtime stage without a container engine: a bare Debian 12 with
# nothing but the packages that the image would install, the server copied in, then run
# as the image and the pod run it: read-only root, a small /tmp, no privileges, process 1
# of its own namespaces. It must print its version, accept the base's configuration,
# serve the bundled model on the image's addresses and drain on SIGTERM. Minutes: 2.
#
#   tests/deploy/runtime_image.sh [PROGRAM]     (default: the build folder's server)
#
# Needs root (for namespaces and mounts) and a PROGRAM built on Debian 12.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/../../scripts/common.sh"

program=${1:-$build_dir/bin/pbs-prefilld}
[ -x "$program" ] || fail "$program is not built"
[ "$(id -u)" -eq 0 ] || fail "namespaces and mounts need root"
install_packages mmdebstrap

work=$(mktemp -d)
trap 'stop_server || true; rm -rf --one-file-system "$work"' EXIT
root=$work/root

packages=$("$repo/deploy/runtime_packages.sh" "$program")
say "Debian 12 with $(wc -w <<<"$packages") packages: $(paste -sd' ' <<<"$packages")"
mmdebstrap --quiet --variant=minbase --include="$(paste -sd, <<<"$packages")" \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$root"
strip -o "$root/usr/local/bin/pbs-prefilld" "$program"
install -D -m 644 "$repo/deploy/kustomize/base/server.json" \
  "$root/etc/pbs-prefill/server.json"
mkdir "$root/models"
cp -r "$repo/tests/data/recall-llama" "$root/models/"
chmod -R a+rX "$root/models"
server_size=$(du -h "$root/usr/local/bin/pbs-prefilld" | cut -f1)
say "$(du -shx "$root" | cut -f1) unpacked, of it the server $server_size"

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
    mount -t tmpfs -o size=64m,nosuid,nodev tmpfs "$root/tmp"
    mount -o remount,bind,ro "$root"
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
      chroot "$root" setpriv --reuid 65532 --regid 65532 --clear-groups \
      --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
  ' in_image "$root" "$@"
}

say "user, groups and the mount of the root"
# shellcheck disable=SC2016  # expanded inside
(in_image sh -euc 'id; grep " / " /proc/mounts | cut -d" " -f2,4; touch /tmp/x
  [ "$(id -u)" -ne 0 ]; grep -q "^[^ ]* / [^ ]* ro[, ]" /proc/mounts')
say "pbs-prefilld --version"
(in_image pbs-prefilld --version)
say "pbs-prefilld --check-config"
(in_image pbs-prefilld --check-config --config /etc/pbs-prefill/server.json)

say "serving the bundled model from the image's entry point"
entry_point=$(sed -n 's/^ENTRYPOINT \[\(.*\)\]$/\1/p' "$repo/deploy/Dockerfile" | tr -d '",')
log=$work/server.log
# shellcheck disable=SC2086  # words of the entry point
start_server "$log" in_image $entry_point --backend cpu --model recall=/models/recall-llama
grep '"event":"serving"' "$log"
# The server is the one child of what made its namespaces, which ends with its status.
kill -TERM "$(cut -d' ' -f1 "/proc/$server/task/$server/children")"
wait "$server" || {
  cat "$log" >&2
  fail "the server did not drain on SIGTERM"
}
server=
tail -1 "$log"
say "the runtime stage has everything the server needs"
