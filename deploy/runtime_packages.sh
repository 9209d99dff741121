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

program=$1
libraries=$(ldd "$program")
if grep 'not found' <<<"$libraries" >&2; then
  echo "error: $program lacks the libraries above" >&2
  exit 1
fi
mapfile -t files < <(awk '$2 == "=>" { print $3 } $1 ~ /^\// { print $1 }' <<<"$libraries")

# The loader says /lib/... where dpkg may know /usr/lib/... One question for all of them:
# dpkg reads its whole database for each. It fails when it does not know one of the names.
# A package that diverts a path is named on lines of its own.
declare -A owner
while IFS= read -r line; do
  owner[${line##*: }]=${line%%[:,]*}
done < <(dpkg-query -S "${files[@]}" "${files[@]/#//usr}" "${files[@]#/usr}" 2>/dev/null |
  grep -v '^diversion by ')

packages=()
for file in "${files[@]}"; do
  package=${owner[$file]:-${owner[/usr$file]:-${owner[${file#/usr}]:-}}}
  [ -n "$package" ] || {
    echo "error: no package owns $file, which $program loads" >&2
    exit 1
  }
  packages+=("$package")
done
printf '%s\n' "${packages[@]}" | sort -u
