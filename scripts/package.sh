#!/usr/bin/env bash
# One tar that runs where nothing of ours is installed: server, clients, the CUDA module
# (where nvcc is there to build it) and every library that they need, but glibc and
# cuBLASLt. For x86-64 with glibc 2.36 or later.
#
#   scripts/package.sh           to build/pbs-prefill-VERSION-x86_64.tar.xz
#   scripts/package.sh --check   also unpacks it, looks at what it needs, and serves the
#                                bundled model out of it
#
# Programs and libraries find each other from where they lie ($ORIGIN): unpack anywhere.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

megabytes_max=40
glibc_max=2.36
# Of glibc, and so of the machine.
machine_libraries='^(ld-linux-x86-64|libc|libm|libdl|libpthread|librt|libresolv)\.so'

# needed FILE: paths of the shared libraries that it needs, but the machine's.
needed() {
  local found
  found=$(ldd "$1")
  ! grep -F "not found" <<<"$found" || fail "$1 lacks a library on this machine"
  awk '$2 == "=>" { print $3 }' <<<"$found" | while read -r path; do
    [[ $(basename "$path") =~ $machine_libraries ]] || echo "$path"
  done
}

# Whose code a library is, and under which licence.
copy_licence() { # LIBRARY FOLDER
  local file package
  file=$(readlink -f "$1")  # packages name it with or without /usr
  package=$( (dpkg-query -S "$file" || dpkg-query -S "${file#/usr}") 2>/dev/null |
    head -1 | cut -d: -f1) || fail "no package owns $file: whose licence is it?"
  cp "/usr/share/doc/$package/copyright" "$2/$package"
}

make_package() { # NAME
  local tree=$work/$1 file path
  mkdir -p "$tree/bin" "$tree/lib" "$tree/licenses"
  for file in pbs-prefilld pbs-decode pbs-bench; do
    strip -o "$tree/bin/$file" "$build_dir/bin/$file"
  done
  if [ -e "$build_dir/lib/libpbs_cuda.so" ]; then
    strip --strip-unneeded -o "$tree/lib/libpbs_cuda.so" "$build_dir/lib/libpbs_cuda.so"
  fi
  for file in "$tree"/bin/* "$tree"/lib/*; do needed "$file"; done | sort -u |
    while read -r path; do
      cp -L "$path" "$tree/lib/"
      copy_licence "$path" "$tree/licenses"
    done
  cp "$repo/LICENSE" "$repo/README.md" "$tree/"
  chmod u+w "$tree"/lib/*
  # shellcheck disable=SC2016  # $ORIGIN is the loader's
  patchelf --set-rpath '$ORIGIN/../lib' "$tree"/bin/*
  # shellcheck disable=SC2016
  patchelf --set-rpath '$ORIGIN' "$tree"/lib/*
  tar -C "$work" --owner=0 --group=0 --sort=name -c "$1" | xz -T0 -6 >"$build_dir/$1.tar.xz"
}

# Answers of the unpacked programs, with nothing of this machine but glibc in sight.
check_package() { # NAME
  local tree=$work/unpacked/$1 file newest megabytes refused
  mkdir -p "$work/unpacked"
  tar -C "$work/unpacked" -xf "$build_dir/$1.tar.xz"
  megabytes=$(($(stat -c %s "$build_dir/$1.tar.xz") >> 20))
  [ "$megabytes" -lt "$megabytes_max" ] || fail "$megabytes MiB, not below $megabytes_max"
  for file in "$tree"/bin/* "$tree"/lib/*; do
    needed "$file" | grep -v "^$tree/" && fail "$file takes a library from outside"
  done
  newest=$(objdump -T "$tree"/bin/* "$tree"/lib/* | grep -o 'GLIBC_2\.[0-9]*' |
    sort -t. -k2 -n -u | tail -1)
  [ "$(printf '%s\n' "${newest#GLIBC_}" "$glibc_max" | sort -V | tail -1)" = "$glibc_max" ] ||
    fail "it needs $newest, more than $glibc_max"
  if [ -e "$tree/lib/libpbs_cuda.so" ] && ! nvidia-smi >/dev/null 2>&1; then
    refused=$(env -i "$tree/bin/pbs-prefilld" --backend cuda --metrics-listen off 2>&1 || true)
    grep -q "CUDA sees no device" <<<"$refused" ||
      fail "the packaged CUDA module does not load: $refused"
  fi
  serve_from "$tree"
  say "$megabytes MiB, needs glibc ${newest#GLIBC_}, the answer is right"
}

serve_from() { # TREE
  local data=$repo/tests/data/recall-llama answer wanted
  start_server "$work/server.log" env -i "$1/bin/pbs-prefilld" --listen 127.0.0.1:0 \
    --metrics-listen off --model "recall=$data"
  env -i "$1/bin/pbs-decode" --server "$address" --model-path "$data" \
    --tokens "$data/prompt_8k.json" --then-tokens "$data/prompt_8k.question.json" \
    --max-new-tokens 1 --output "$work/tokens.json"
  answer=$(tr -d '[:space:]' <"$work/tokens.json")
  wanted=$(tr -d '[:space:]' <"$data/prompt_8k.answer.json")
  [ "$answer" = "$wanted" ] || fail "the packaged programs answer $answer, not $wanted"
  stop_server
}

install_packages "${build_packages[@]}" patchelf xz-utils binutils
build_targets pbs-prefilld pbs-decode pbs-bench
if command -v nvcc >/dev/null; then
  "$repo/scripts/build_cuda.sh"
else
  say "there is no nvcc: the package has no CUDA module"
fi
work=$(mktemp -d)
trap 'stop_server || true; rm -rf "$work"' EXIT
version=$(sed -n 's/^project(pbs_prefill VERSION \([0-9.]*\).*/\1/p' "$repo/CMakeLists.txt")
name=pbs-prefill-$version-x86_64
say "packing $name"
make_package "$name"
[ "${1:-}" != --check ] || check_package "$name"
say "$build_dir/$name.tar.xz, $(du -h "$build_dir/$name.tar.xz" | cut -f1)"
