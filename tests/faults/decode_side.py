#!/usr/bin/env python3
"""A decode side: a process that takes caches and says what it got.

First a line {"ready": true}. Then one command per line of standard input, a JSON object,
and one reply per line of standard output. With PROMPT an index of caches.PROMPTS:

    {"do": "fetch", "target": T, "ticket": TICKET, ...}   a leased cache
    {"do": "inline", "target": T, "prompt": PROMPT, ...}  a prefill with its cache
    {"do": "sink", "target": T, ...}                      listens there for one push, after
        a line {"listens": true}; "kill_at": LAYER: kills itself (SIGKILL) when it has it

    "timeout": seconds, "resumes": count, "behind_relay": BOOL, "options": [[KEY, VALUE]],
    "shared_memory": PATH of the socket of a server whose memory it maps,
    "stop": {"at": BYTE, "how": "kill" | "hang" | "leave"}: when that many payload bytes
    came, the process kills itself (SIGKILL), stops itself (SIGSTOP, after a line
    {"hangs": true}), or leaves the call

The reply: {"layers": {LAYER: DIGEST}, of layers that were handed over as whole, "cache":
[DIGEST, ...] of a call that succeeded, or "code": the code of its PbsError, or "left":
true, or "exception": what must not come}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import Any

from caches import MODEL, PROMPTS, digest_of_layer, digests_of
from pbs_client import Client, DeadlineExceededError, KvSink, KvTicket, PbsError

POLL_SECONDS = 0.05


class LeaveError(Exception):
    """Raised in a callback to leave a call half way."""


class Stop:
    """Does what a command says at its byte."""

    def __init__(self, given: dict[str, Any] | None) -> None:
        self._given = given

    def __call__(self, _: str, done: int, __: int) -> None:
        if self._given is None or done < self._given["at"]:
            return
        how, self._given = self._given["how"], None
        if how == "leave":
            raise LeaveError
        if how == "hang":
            say({"hangs": True})
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[how])


def say(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


def fetch(client: Client, command: dict[str, Any], layers: dict[int, str]) -> list[str]:
    def on_layer(layer: int, k: Any, v: Any) -> None:
        layers[layer] = digest_of_layer(k, v)

    return digests_of(
        client.fetch(
            KvTicket.from_json(command["ticket"]),
            resumes=command.get("resumes", 3),
            timeout=command["timeout"],
            on_layer=on_layer,
            progress=Stop(command.get("stop")),
        )
    )


def inline(client: Client, command: dict[str, Any], _: dict[int, str]) -> list[str]:
    prompt = PROMPTS[command["prompt"]]
    result = client.prefill(
        MODEL,
        prompt.tokens(),
        prompt.attention(),
        delivery="inline",
        timeout=command["timeout"],
    )
    return digests_of(result.kv)


def sink(command: dict[str, Any], layers: dict[int, str]) -> list[str]:
    failures: list[PbsError] = []

    def on_layer(_: Any, layer: int, k: Any, v: Any) -> None:
        if layer == command.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        layers[layer] = digest_of_layer(k, v)

    end = time.monotonic() + command["timeout"]
    with KvSink(
        command["target"],
        on_layer=on_layer,
        on_failure=lambda _, error: failures.append(error),
    ) as listening:
        say({"listens": True})
        while True:
            try:
                return digests_of(listening.take(POLL_SECONDS).cache)
            except DeadlineExceededError:
                if failures:
                    raise failures[0] from None
                if time.monotonic() > end:
                    raise


def run(command: dict[str, Any]) -> dict[str, Any]:
    """What came of one command."""
    layers: dict[int, str] = {}
    reply: dict[str, Any] = {}
    options = [tuple(option) for option in command.get("options", ())]
    follow = not command.get("behind_relay", False)
    try:
        if command["do"] == "sink":
            reply["cache"] = sink(command, layers)
            return {"layers": layers, **reply}
        with Client(
            command["target"],
            channel_options=options,
            follow_endpoints=follow,
            shared_memory_socket=command.get("shared_memory", ""),
        ) as client:
            work = {"fetch": fetch, "inline": inline}[command["do"]]
            reply["cache"] = work(client, command, layers)
    except PbsError as error:
        reply["code"] = error.code.name
    except LeaveError:
        reply["left"] = True
    except Exception:
        reply["exception"] = traceback.format_exc()
    return {"layers": layers, **reply}


def main() -> None:
    say({"ready": True})
    for line in sys.stdin:
        say(run(json.loads(line)))


if __name__ == "__main__":
    main()
