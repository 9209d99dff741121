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
"$build_dir/bin/pbs-prefilld" --backend cpu --model "recall=$model" \
  --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 >"$run_dir/server.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT

# field NAME: a field of the server's "serving" event.
field() {
  grep -m1 '"event":"serving"' "$run_dir/server.log" |
    sed -n "s/.*\"$1\":\"\\{0,1\\}\\([^\",}]*\\).*/\\1/p"
}
for _ in $(seq 300); do
  grep -q '"event":"serving"' "$run_dir/server.log" && break
  kill -0 "$server" 2>/dev/null || {
    cat "$run_dir/server.log" >&2
    fail "the server stopped"
  }
  sleep 0.1
done
address=$(field listen)
metrics=$(field metrics)
[ -n "$address" ] || fail "the server is not serving after 30 s; see $run_dir/server.log"
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
kill "$server"
wait "$server"
trap - EXIT
echo "done; the server's log is $run_dir/server.log" >&2
