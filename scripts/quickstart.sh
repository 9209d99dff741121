#!/usr/bin/env bash
# From nothing to a decoded answer: installs what is missing, builds, serves the bundled
# model on the CPU, prefills a prompt of 8190 tokens with PBS-Attn, hands the KV cache to
# a separate decode process, checks its answer, and stops. A second run takes seconds.
set -euo pipefail
# shellcheck source=scripts/common.sh
. "$(dirname "$0")/common.sh"

model=$repo/tests/data/recall-llama
run_dir=$build_dir/quickstart

install_packages "${build_packages[@]}"
build_targets pbs-prefilld pbs-decode
mkdir -p "$run_dir"

say "starting the server with the bundled model"
trap 'stop_server || true' EXIT
start_server "$run_dir/server.log" "$build_dir/bin/pbs-prefilld" --backend cpu \
  --model "recall=$model" --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0
echo "serving on $address, metrics on http://$metrics/metrics" >&2

say "prefill on the server, decode in another process"
"$build_dir/bin/pbs-decode" --server "$address" --model recall --model-path "$model" \
  --tokens "$model/prompt_8k.json" --then-tokens "$model/prompt_8k.question.json" \
  --max-new-tokens 1 --method pbs --threshold 0.9 --output "$run_dir/tokens.json"

expected=$(tr -d '[:space:]' <"$model/prompt_8k.answer.json")
decoded=$(tr -d '[:space:]' <"$run_dir/tokens.json")
[ "$decoded" = "$expected" ] || fail "decoded $decoded, expected $expected"
printf '\nright: the decode tier answered %s from the transferred KV cache\n' "$decoded"

say "some of its metrics"
exec 3<>"/dev/tcp/${metrics%:*}/${metrics##*:}"
printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
names='prompt_tokens_total|attention_flops_(computed|dense)_total'
names+='|kv_transfer_bytes_total|kv_leases|requests_total{code="OK"'
grep -aE "^pbs_($names)" <&3 | grep -v ' 0$' | sort
exec 3>&-

say "stopping (SIGTERM drains, then exits)"
stop_server
echo "done; the server's log is $run_dir/server.log" >&2
