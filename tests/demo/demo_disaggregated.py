#!/usr/bin/env python3
"""Disaggregated serving on one machine: scripts/demo_disaggregated.sh runs it.

Two prefill nodes with a gateway each, vllm-router, and a vLLM decode worker on the CPU.
A long document and a question go through the router as chat text. Then one of the nodes
is killed while several users wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chat import Answer, ask
from killed_node import USERS, Outcome, kill_under_load
from processes import DemoError, Programs
from tiers import Tiers, metric, start_tiers
from timeline import Span, as_json, draw, interval, spans_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))
from bench_common import run_header  # noqa: E402

DOCUMENT = ROOT / "LICENSE"
QUESTION = "Which section of this license is about trademarks, and what does it say?"
SHORT_QUESTION = "What is the capital of France?"
MAX_TOKENS = 64
# Of vLLM. The usage that users get has the cached tokens of the prefill worker instead.
REUSED = "vllm:external_prefix_cache_hits_total"
_QUICK_CHARACTERS = 1200  # the tiny model has a token for almost every byte
_PARTS = 3  # of the document, for the users at once
_LINE_WIDTH = 88
_RELEASE_SECONDS_MAX = 10.0


@dataclass(frozen=True)
class Routed:
    """The long request, measured."""

    answer: Answer
    spans: list[Span]
    density: float
    moved_bytes: int
    reused_tokens: int


def step(text: str) -> None:
    """Says what comes."""
    print(f"\n\033[1m== {text}\033[0m", flush=True)


def printer() -> Callable[[str], None]:
    """Prints text as it comes, broken at spaces."""
    column = 0

    def show(text: str) -> None:
        nonlocal column
        for piece in text.splitlines(keepends=True):
            if column + len(piece) > _LINE_WIDTH and piece.startswith(" "):
                print()
                column, piece = 0, piece[1:]
            print(piece, end="", flush=True)
            column = 0 if piece.endswith("\n") else column + len(piece)

    return show


def with_document(document: str, question: str) -> str:
    """A prompt of the document and a question."""
    return f"{document}\n\n{question}"


def ask_about_document(tiers: Tiers, document: str) -> Routed:
    """Streams the answer to the terminal, and measures where the time went."""
    names = ("attention_flops_computed_total", "attention_flops_dense_total",
             "kv_transfer_bytes_total")  # fmt: skip
    before = _sums(tiers, names)
    reused = metric(tiers.vllm_address, REUSED)
    prompt = with_document(document, QUESTION)
    answer = ask(tiers.router_address, tiers.model, prompt, MAX_TOKENS, printer())
    print()
    if answer.error:
        raise DemoError(
            f"the request failed: {answer.error}",
            f"read {tiers.router.log}, {tiers.gateways[0].log} and {tiers.vllm.log}",
        )
    computed, dense, moved = (
        after - old for after, old in zip(_sums(tiers, names), before)
    )
    calls = [event for node in tiers.nodes for event in node.program.events("call")]
    recent = [event for event in calls if _ended_after(event, answer.sent)]
    prefills = [event for event in recent if event["rpc"] == "prefill"]
    fetches = [event for event in recent if event["rpc"] == "fetch"]
    reused = metric(tiers.vllm_address, REUSED) - reused
    if not (reused and prefills and fetches):
        raise DemoError(
            "vLLM did not take the cache and computed the prompt itself",
            f"read {tiers.vllm.log} for the reason",
        )
    spans = spans_of(answer, prefills[-1], fetches)
    density = computed / dense if dense else 1.0
    return Routed(answer, spans, density, int(moved), int(reused))


def _ended_after(event: dict[str, Any], moment: float) -> bool:
    return interval(event)[1] > moment


def _sums(tiers: Tiers, names: tuple[str, ...]) -> list[float]:
    return [
        sum(metric(node.metrics, f"pbs_{name}") for node in tiers.nodes) for name in names
    ]


def await_no_lease(tiers: Tiers) -> None:
    """Every cache must have been given back, on the node that lives."""
    end = time.monotonic() + _RELEASE_SECONDS_MAX
    while metric(tiers.nodes[1].metrics, "pbs_kv_leases"):
        if time.monotonic() > end:
            raise DemoError("a lease was not released", f"read {tiers.vllm.log}")
        time.sleep(0.05)


def table(routed: Routed, killed: Outcome) -> str:
    """The summary."""
    answer = routed.answer
    took = {(s.lane, s.what): s.end - s.begin for s in routed.spans}
    prefill = took["pbs-prefilld", "prefill"]
    around = sum(s for (lane, _), s in took.items() if lane == "router, pbs-gateway")
    moving = took["KV cache", "transfer, checked"]
    more = took["vLLM", "further tokens"]
    rate = (answer.tokens - 1) / more if more > 0 else 0.0
    mib = routed.moved_bytes / 2**20
    rows = [
        ("time to first token", f"{answer.first - answer.sent:.2f} s", "of which"),
        ("  prefill", f"{prefill:.2f} s", f"pbs-prefilld, {answer.prompt_tokens:,} tokens"),
        ("  routing", f"{around:.2f} s", "router, gateway, chat template, queue of vLLM"),
        ("  hand-off", f"{moving:.2f} s", f"{mib:,.1f} MiB of keys and values, checked"),
        ("  first token", f"{took['vLLM', 'first token']:.2f} s", "vLLM"),
        ("further tokens", f"{more:.2f} s", f"vLLM, {rate:.0f} tokens/s"),
        ("density", f"{routed.density:.2f}", "computed attention blocks, 1.00 is dense"),
        ("reused by vLLM", f"{routed.reused_tokens:,}",
         f"of {answer.prompt_tokens:,} prompt tokens; it computes the last one"),
        ("node killed, answered", f"{killed.requests - len(killed.lost)}",
         f"of {killed.requests} requests of {USERS} users"),
        ("  repeated", f"{killed.moved}", "its prefill died with node 1; a gateway repeated it at node 2"),
        ("  computed again", f"{killed.recomputed}", "by vLLM: the cache died with the node"),
        ("  lost", f"{len(killed.lost)}", ""),
    ]  # fmt: skip
    return "\n".join(f"{name:22}{value:>9}  {text}".rstrip() for name, value, text in rows)


def run(words: argparse.Namespace, programs: Programs) -> None:
    """All steps."""
    # What else ran on the machine shows in every figure.
    header = {**run_header(), "load_average": os.getloadavg()[1]}
    document = DOCUMENT.read_text()
    if words.quick:
        document = document[:_QUICK_CHARACTERS]
    step("starting two prefill nodes, two gateways, a vLLM decode worker and the router")
    tiers = start_tiers(programs, words.prefilld, words.model_name, words.model)

    step(f"a short question, so that everything has run once: {SHORT_QUESTION}")
    warm = ask(tiers.router_address, tiers.model, SHORT_QUESTION, MAX_TOKENS, printer())
    print()
    if warm.error:
        raise DemoError(
            f"the request failed: {warm.error}",
            f"read {tiers.router.log}, {tiers.gateways[0].log} and {tiers.vllm.log}",
        )
    step(f"{DOCUMENT.name} ({len(document):,} characters), then: {QUESTION}")
    print(
        f"(the answer of {words.model_name}, as it arrives after the prefill)", flush=True
    )
    routed = ask_about_document(tiers, document)

    step(f"{USERS} users ask about parts of the document; node 1 is killed meanwhile")
    size = len(document) // _PARTS
    killed = kill_under_load(
        tiers,
        lambda n: with_document(
            f"Note {n}. {document[(n % _PARTS) * size :][:size]}", "What is this about?"
        ),
    )
    await_no_lease(tiers)
    step("summary")
    print(table(routed, killed), flush=True)
    if killed.lost:
        raise DemoError(
            f"{len(killed.lost)} requests were lost: {killed.lost[0]}",
            f"read {tiers.router.log} and {tiers.gateways[0].log}",
        )
    print(
        "\nno request was lost. The router itself retries nothing: a gateway sends a prefill"
    )
    print("to its other node, and vLLM computes a prompt whose cache is gone.")
    if words.result:
        save(words.result, header, words, routed, killed)
    if words.keep:
        keep(tiers)


def save(
    path: Path,
    header: dict[str, Any],
    words: argparse.Namespace,
    routed: Routed,
    killed: Outcome,
) -> None:
    """Writes the results file and its picture."""
    answer = routed.answer
    result = {
        **header,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": words.model_name,
        "document": DOCUMENT.name,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.tokens,
        "reused_tokens": routed.reused_tokens,
        "density": round(routed.density, 4),
        "kv_bytes": routed.moved_bytes,
        "spans": as_json(routed.spans),
        "killed_node": {**asdict(killed), "lost": len(killed.lost), "users": USERS},
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".svg").write_text(draw(result))
    print(f"\nwrote {path} and its picture")


def keep(tiers: Tiers) -> None:
    """Leaves everything running until Ctrl-C."""
    step("it stays up until Ctrl-C; node 1 stays dead. Try:")
    body = json.dumps(
        {"model": tiers.model, "max_tokens": 40, "stream": True,
         "messages": [{"role": "user", "content": "Who are you?"}]}
    )  # fmt: skip
    print(f"curl -N http://{tiers.router_address}/v1/chat/completions \\")
    print(f"  -H 'content-type: application/json' -d '{body}'")
    print(f"curl http://{tiers.nodes[1].metrics}/metrics", flush=True)
    while True:
        signal.pause()


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefilld", type=Path, required=True, help="the program")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--logs", type=Path, required=True, help="folder for logs")
    parser.add_argument("--quick", action="store_true", help="the model is tiny")
    parser.add_argument("--keep", action="store_true", help="stay up at the end")
    parser.add_argument("--result", type=Path, help="JSON file to write, and a picture")
    return parser.parse_args()


def _end(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Runs the demo; whatever happens, nothing is left running."""
    words = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    words.logs.mkdir(parents=True, exist_ok=True)
    programs = Programs(words.logs)
    try:
        run(words, programs)
        return 0
    except DemoError as error:
        print(f"\nerror: {error}\nnext: {error.then}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            print(f"\nstopping all programs; their logs are in {words.logs}", flush=True)
        programs.stop()


if __name__ == "__main__":
    sys.exit(main())
