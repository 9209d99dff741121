"""Several users at once, while one of the two nodes is killed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from chat import Answer, ask
from processes import DemoError
from tiers import Tiers, metric

USERS = 4
REQUESTS = 12
MAX_TOKENS = 16
_KILL_SECONDS_MAX = 300.0
_POLL_SECONDS = 0.02
_RUNNING = "pbs_requests_running"


@dataclass(frozen=True)
class Outcome:
    """What became of the requests.

    Attributes:
        requests: that were sent.
        lost: those that have no answer, as messages.
        moved: those that a gateway sent to the other node.
        recomputed: those whose cache died before vLLM had it.
        before: those that had an answer when the node was killed.
    """

    requests: int
    lost: list[str]
    moved: int
    recomputed: int
    before: int


def kill_under_load(tiers: Tiers, question_of: Callable[[int], str]) -> Outcome:
    """Kills node 1 while it prefills; the users notice nothing but the time."""
    victim = tiers.nodes[0]
    moved, refused = _failovers(tiers), _refused_loads(tiers)
    with ThreadPoolExecutor(USERS) as users:
        calls = [
            users.submit(ask, tiers.router_address, tiers.model, question_of(n), MAX_TOKENS)
            for n in range(REQUESTS)
        ]
        _await_prefill(victim.metrics, calls)
        before = sum(call.done() for call in calls)
        victim.program.kill()
        print(
            f"node 1 is dead (SIGKILL) after {before} answers, in the midst of a prefill; "
            f"{len(calls) - before} requests wait for theirs",
            flush=True,
        )
        wait(calls)
    answers: list[Answer] = [call.result() for call in calls]
    return Outcome(
        requests=len(answers),
        lost=[answer.error for answer in answers if answer.error],
        moved=_failovers(tiers) - moved,
        recomputed=len(_refused_loads(tiers) - refused),
        before=before,
    )


def _refused_loads(tiers: Tiers) -> set[str]:
    """Requests whose cache vLLM could not take, by the connector's lines in its log."""
    text = tiers.vllm.log.read_text(errors="replace")
    return set(
        re.findall(r"(?:load|hand-off) of request (\S+?)(?: failed)?: (?!the req)", text)
    )


def _await_prefill(metrics: str, calls: list[Future[Answer]]) -> None:
    """Waits until some requests are answered and the node is at work."""
    end = time.monotonic() + _KILL_SECONDS_MAX
    while sum(call.done() for call in calls) < 2 or metric(metrics, _RUNNING) == 0:
        if time.monotonic() > end or all(call.done() for call in calls):
            raise DemoError(
                "no prefill ran on node 1 while there were requests",
                "try again; the requests were over before the node could be killed",
            )
        time.sleep(_POLL_SECONDS)


def _failovers(tiers: Tiers) -> int:
    """Requests that the gateways have sent to their other node."""
    return int(
        sum(metric(gateway, "pbs_gateway_failovers_total")
            for gateway in tiers.gateway_addresses)
    )  # fmt: skip
