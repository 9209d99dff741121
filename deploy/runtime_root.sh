#!/usr/bin/env bash
# Lays out the CPU image's whole file system: PROGRAM and what it loads. There is no shell
# in it, no package manager, and nothing that PROGRAM does not open.
#
#   deploy/runtime_root.sh PROGRAM ROOT
#
#   /usr/local/bin            PROGRAM, stripped
#   /usr/lib, /lib64          the shared libraries (ldd) and the loader, at their own paths
#   /etc                      the user 65532, the order of name lookup, the release's name
#   /var/lib/dpkg/status.d    each package that a file is from: scanners for known
#                             vulnerabilities read names and versions there
#   /usr/share/doc            the licences of those packages
#
# glibc reads names from /etc/hosts and DNS by itself, so nothing else is opened at run
# time; a library of PROGRAM that loads others by name would need them added here.
# Run it where PROGRAM was linked.
set -euo pipefail

[ $# -eq 2 ] || {
  echo "usage: $0 PROGRAM ROOT" >&2
  exit 2
}
program=$1 root=$2
deploy=$(dirname "$(realpath "$0")")

# place FILE: copies it to its own path, and makes the link by which it is loaded.
place() {
  local file named
  file=$(readlink -f "$1")
  named=$1
  [[ $named == /usr/* ]] || named=/usr$named
  mkdir -p "$root${file%/*}" "$root${named%/*}"
  cp -p "$file" "$root$file"
  [ "$file" = "$named" ] || ln -srf "$root$file" "$root$named"
}

packages=$("$deploy/runtime_packages.sh" "$program")
mkdir -p "$root"/{etc,usr/lib,usr/lib64,usr/local/bin,var/lib/dpkg/status.d}
ln -sfn usr/lib "$root/lib"
ln -sfn usr/lib64 "$root/lib64"
strip -o "$root/usr/local/bin/${program##*/}" "$program"
ldd "$program" | awk '$2 == "=>" { print $3 } $1 ~ /^\// { print $1 }' |
  while read -r library; do
    # A variant for this machine's CPU would not run on every one.
    if grep -q glibc-hwcaps <<<"$library"; then
      echo "error: $library is made for this CPU alone; build where the loader takes another" >&2
      exit 1
    fi
    place "$library"
  done

cp -p /usr/lib/os-release "$root/usr/lib/"
ln -sf ../usr/lib/os-release "$root/etc/os-release"
cp -p /etc/debian_version "$root/etc/"
echo "hosts: files dns" >"$root/etc/nsswitch.conf"
echo "pbs:x:65532:65532::/nonexistent:/nonexistent" >"$root/etc/passwd"
echo "pbs:x:65532:" >"$root/etc/group"
# Engines mount their own over these, and some leave programs of that name without them.
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
touch "$root/etc/hostname" "$root/etc/resolv.conf"

# base-files has the release's name and the licences that copyright files refer to.
mkdir -p "$root/usr/share"
cp -a /usr/share/common-licenses "$root/usr/share/"
while read -r package; do
  dpkg-query -s "$package" >"$root/var/lib/dpkg/status.d/$package"
  mkdir -p "$root/usr/share/doc/$package"
  cp -L "/usr/share/doc/$package/copyright" "$root/usr/share/doc/$package/"
done < <(sort -u <<<"$packages"$'\n'base-files)
mkdir -p "$root/usr/local/share/doc/pbs-prefill"
cp "$deploy/../LICENSE" "$root/usr/local/share/doc/pbs-prefill/"
echo "$packages" >"$root/usr/local/share/doc/pbs-prefill/runtime-packages"
