#!/usr/bin/env bash
# Builds the CPU image of deploy/Dockerfile with buildah, in OCI's format and in Docker's,
# on a base that mmdebstrap makes: no registry and no container engine. Each is unpacked
# and has to pass scripts/check.sh image. Sizes go to docs/results/image.json.
#
#   scripts/build_image.sh [SUITE]    a Debian suite; default trixie
#
# BUILDAH_ROOT   where images are kept (default: a folder that goes away at the end)
#
# Needs root and a package mirror. The compiler cache in build/image-ccache makes the
# second format and the next run short.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

suite=${1:-trixie}
[ "$(id -u)" -eq 0 ] || fail "mounts need root"
install_packages buildah mmdebstrap python3
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
store=${BUILDAH_ROOT:-$work/store}
cache=$build_dir/image-ccache
mkdir -p "$cache" "$store"
base=localhost/debian:$suite
git -C "$repo" diff --quiet HEAD || fail "there are changes that are not committed: the image would not be of a commit"
commit=$(git -C "$repo" rev-parse HEAD)

images() { buildah --storage-driver vfs --root "$store" --runroot "$work/run" "$@"; }

make_base() {
  local container
  say "$base, a bare $suite"
  mmdebstrap --quiet --variant=minbase "$suite" "$work/base"
  container=$(images from scratch)
  images copy -q "$container" "$work/base" / >/dev/null
  images commit -q "$container" "$base" >/dev/null
  images rm "$container" >/dev/null
  rm -rf --one-file-system "$work/base"
}

# build FORMAT: the image, and its check. The volume is where the compiler cache of the
# build container's user lies.
build() {
  local image=localhost/pbs-prefill:$1 container mounted
  say "building $image"
  images bud --isolation chroot --format "$1" -f "$repo/deploy/Dockerfile" -t "$image" \
    --build-arg BUILD_BASE="$base" --build-arg REVISION="$commit" \
    --volume "$cache:/root/.cache/ccache" "$repo"
  container=$(images from "$image")
  mounted=$(images mount "$container")
  "$repo/scripts/check.sh" image --root "$mounted"
  images push -q "$image" "oci-archive:$work/$1.tar" >/dev/null # one measure for both
  images inspect --type image "$image" >"$work/$1.json"
  du -sb --apparent-size "$mounted" | cut -f1 >"$work/$1.unpacked"
  stat -c %s "$work/$1.tar" >"$work/$1.packed"
  find "$mounted" -type f -printf '%s\t/%P\n' | sort -rn >"$work/$1.files"
  cp "$mounted/usr/local/share/doc/pbs-prefill/runtime-packages" "$work/packages"
  images rm "$container" >/dev/null
}

# What the same packages on a slim base take: no manuals, no translations, no lists of apt.
measure_slim() {
  local root=$work/slim
  say "a slim $suite with the same packages"
  mmdebstrap --quiet --variant=minbase --include="$(paste -sd, "$work/packages")" \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' "$suite" "$root"
  rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin
  du -sb --apparent-size "$root" | cut -f1 >"$work/slim.unpacked"
  tar -C "$root" -cz . | wc -c >"$work/slim.packed"
}

if ! images inspect --type image "$base" >/dev/null 2>&1; then make_base; fi
for format in oci docker; do build "$format"; done
measure_slim

PBS_BENCH_COMMAND="scripts/build_image.sh $suite" \
  PYTHONPATH="$repo/tests/bench" python3 - "$work" "$suite" "$commit" <<'PYTHON'
import json
import pathlib
import sys

from bench_common import run_header, write_results

work, suite, commit = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
slim = {f"{k}_bytes": int((work / f"slim.{k}").read_text()) for k in ("unpacked", "packed")}
formats = {}
for name, key in ("oci", "OCIv1"), ("docker", "Docker"):
    image = json.loads((work / f"{name}.json").read_text())
    config = image[key]["config"]
    assert config["User"] == "65532:65532", config
    assert config["Entrypoint"][0] == "pbs-prefilld", config
    assert config["StopSignal"] == "SIGTERM", config
    formats[name] = {
        "media_type": json.loads(image["Manifest"])["config"]["mediaType"],
        "unpacked_bytes": int((work / f"{name}.unpacked").read_text()),
        "packed_bytes": int((work / f"{name}.packed").read_text()),
    }
files = [line.split("\t") for line in (work / "oci.files").read_text().splitlines()]
largest = {path: int(size) for size, path in files[:8]}
write_results(
    "image",
    {**run_header(), "commit": commit},
    {
        "suite": suite,
        "formats": formats,
        "slim_base_without_the_server": slim,
        "files": len(files),
        "largest": largest,
    },
)
PYTHON
