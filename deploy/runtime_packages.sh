#!/usr/bin/env bash
# Prints the Debian packages that own the shared libraries PROGRAM loads, one a line,
# sorted. The image's runtime stage installs exactly these: the list is found at build
# time (ldd, then dpkg-query -S), so it follows the code and the distribution.
#
#   deploy/runtime_packages.sh PROGRAM
#
# Run it where PROGRAM was linked. Fails when a library is missing or nobody owns it.
set -euo pipefail

[ $# -eq 1 ] || {
  echo "usage: $0 PROGRAM" >&2
  exit 2
}

# owner FILE: its package. The loader says /lib/... where dpkg may know /usr/lib/...
owner() {
  local file line
  for file in "$1" "/usr$1" "${1#/usr}"; do
    if line=$(dpkg-query -S "$file" 2>/dev/null); then
      echo "${line%%:*}"
      return
    fi
  done
  echo "error: no package owns $1, which $program loads" >&2
  return 1
}

program=$1
libraries=$(ldd "$program")
if grep 'not found' <<<"$libraries" >&2; then
  echo "error: $program lacks the libraries above" >&2
  exit 1
fi
packages=$(awk '$2 == "=>" { print $3 } $1 ~ /^\// { print $1 }' <<<"$libraries" |
  while read -r file; do owner "$file" || exit 1; done)
sort -u <<<"$packages"
