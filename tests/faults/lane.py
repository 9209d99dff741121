"""A lane: a node, a relay and a decode side, on which one fault after another happens."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from caches import MODEL, PROMPTS, Prompt, digests_of
from fault_processes import (
    LEASE_SECONDS,
    Helper,
    Node,
    eventually,
    free_ports,
    program,
)
from pbs_client import Client, KvCache, KvTicket, NotFoundError, PbsError
from pbs_client.results import LayerProgress

RIGHT, WRONG, KILLED, LEFT = "right", "wrong", "killed", "left"
FREE_SECONDS_MAX = 2.0  # from the end of a lease until nothing is held
TRIES = 3
CALL_SECONDS_MAX = 5.0  # of a call whose end a fault may have taken away
# A decode side that takes little ahead of what it reads.
NARROW = [["grpc.http2.lookahead_bytes", 65536]]

LayerCallback = Callable[[LayerProgress], None]


class LeaveError(Exception):
    """Raised in a callback to leave a call half way."""


class Lane:
    """The processes and what was seen of the fault under way."""

    def __init__(self, model: pathlib.Path) -> None:
        self.model = model
        # Where a decode side listens for pushes, itself and behind the relay.
        self.sink, self.relayed_sink = free_ports(2)
        self._sockets = tempfile.TemporaryDirectory()
        self.socket = f"{self._sockets.name}/kv"  # of caches in shared memory
        self.node = Node(
            model,
            MODEL,
            f"push_targets.0={self.sink}",
            f"push_targets.1={self.relayed_sink}",
            f"shared_memory_socket={self.socket}",
        )
        self.relay = Helper("relay.py")
        self.decode = Helper("decode_side.py")
        self._ready = False
        self._early: dict[str, Any] | None = None  # a reply that came too soon
        self.rng = random.Random(0)
        self.outcomes: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.hits = 0  # what the relay did to connections
        self.seconds_held = 0.0  # the longest from a fault until nothing was held
        self._producer: Future[str] | None = None
        self._pool = ThreadPoolExecutor()
        self.expected: dict[Prompt, list[str]] = {}
        self.bytes_of: dict[Prompt, int] = {}
        try:
            for prompt in PROMPTS:
                self._learn(prompt)
            with self.client() as client:
                self.server_commit = client.info().commit
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown()
        for process in (self.decode, self.relay, self.node):
            process.end()
        self._sockets.cleanup()

    def begin(self, rng: random.Random) -> None:
        """Forgets what was seen; `rng` chooses what the next fault is like."""
        self.rng, self.outcomes, self.notes, self.hits = rng, [], [], 0
        if not self._ready:  # its start would outlast a lease
            assert self.decode.answer() == {"ready": True}
            self._ready = True

    # ---- calls without a fault

    def client(self) -> Client:
        """A new connection to the node itself."""
        return Client(self.node.target)

    def _learn(self, prompt: Prompt) -> None:
        """What a prompt's cache is, by a fetch and by an inline prefill."""
        cache = self._fetched(prompt)
        with self.client() as client:
            inline = client.prefill(
                MODEL, prompt.tokens(), prompt.attention(), delivery="inline"
            ).kv
        self.expected[prompt] = digests_of(cache)
        self.bytes_of[prompt] = cache.nbytes
        assert digests_of(inline) == self.expected[prompt]

    def _fetched(self, prompt: Prompt) -> KvCache:
        """A prompt's cache. A busy machine may be late for a lease, then again."""
        for tries_left in reversed(range(TRIES)):
            ticket = self.hold(prompt)
            with self.client() as client:
                try:
                    cache = client.fetch(ticket, timeout=CALL_SECONDS_MAX * 4)
                except NotFoundError:
                    if tries_left == 0:
                        raise
                    continue
            self.release(ticket)
            return cache
        raise AssertionError("TRIES is 0")

    def prompt(self) -> Prompt:
        """One of the prompts."""
        return self.rng.choice(PROMPTS)

    def hold(self, prompt: Prompt) -> KvTicket:
        """The ticket of a cache that the node holds."""
        with self.client() as client:
            result = client.prefill(
                MODEL,
                prompt.tokens(),
                prompt.attention(),
                delivery="lease",
                timeout=CALL_SECONDS_MAX * 4,
            )
        assert result.ticket is not None
        return result.ticket

    def release(self, ticket: KvTicket) -> None:
        """Gives a lease back that may be gone."""
        with self.client() as client, contextlib.suppress(PbsError):
            client.release(ticket)

    def next_request(self) -> bool:
        """Whether another request gets the bytes that it should."""
        prompt = self.prompt()
        return digests_of(self._fetched(prompt)) == self.expected[prompt]

    # ---- a prefill that a fault may meet

    def begin_prefill(
        self,
        prompt: Prompt,
        *,
        delivery: Any = "lease",
        on_layer: LayerCallback | None = None,
        timeout: float = CALL_SECONDS_MAX,
    ) -> tuple[KvTicket | None, Future[str]]:
        """Its ticket (None: it ended before), and its outcome to come."""
        tickets: queue.Queue[KvTicket | None] = queue.Queue()

        def run() -> str:
            try:
                with self.client() as client:
                    client.prefill(
                        MODEL,
                        prompt.tokens(),
                        prompt.attention(),
                        delivery=delivery,
                        timeout=timeout,
                        on_admitted=lambda _, ticket: tickets.put(ticket),
                        on_layer=on_layer,
                    )
                return RIGHT
            except PbsError as error:
                return error.code.name
            except LeaveError:
                return LEFT
            finally:
                tickets.put(None)

        future = self._pool.submit(run)
        return tickets.get(), future

    def ticket_of(self, prompt: Prompt) -> KvTicket:
        """A held cache, or one whose prefill still runs."""
        if self.rng.random() < 0.6:
            return self.hold(prompt)
        ticket, prefill = self.begin_prefill(prompt)
        assert ticket is not None
        self._producer = prefill
        return ticket

    def settle(self) -> None:
        """Waits for the prefill that ticket_of() began."""
        if self._producer is not None:
            self.saw("producer", self._producer.result())
            self._producer = None

    def nothing_held(self) -> bool:
        """Whether the node comes to hold nothing within a lease and FREE_SECONDS_MAX."""
        begin = time.monotonic()
        free = eventually(lambda: not self.node.held(), LEASE_SECONDS + FREE_SECONDS_MAX)
        self.seconds_held = max(self.seconds_held, time.monotonic() - begin)
        return free

    # ---- the decode side

    def fetch(self, ticket: KvTicket, port: int | None = None, **words: Any) -> None:
        """Begins a fetch, through the relay at `port` if there is one."""
        behind = {} if port is None else {"behind_relay": True}
        target = self.node.target if port is None else f"127.0.0.1:{port}"
        words = {"timeout": CALL_SECONDS_MAX, **words, **behind}
        self.decode.tell("fetch", target=target, ticket=ticket.to_json(), **words)

    def listen(self, **words: Any) -> None:
        """Has the decode side wait for a push."""
        words = {"timeout": CALL_SECONDS_MAX * 2, **words}
        self.decode.tell("sink", target=self.sink, **words)
        assert self.decode.answer() == {"listens": True}

    def hangs(self) -> bool:
        """Waits until the decode side has stopped; False: its call ended before."""
        self._early = self.decode.answer()
        if self._early != {"hangs": True}:
            return False
        self._early = None
        os.waitid(os.P_PID, self.decode.process.pid, os.WSTOPPED | os.WNOWAIT)
        return True

    def see_decode(self, prompt: Prompt) -> str:
        """Waits for the decode side; what it got is an outcome."""
        early, self._early = self._early, None
        outcome = self._outcome(early or self.decode.answer(), prompt)
        self.saw("decode", outcome)
        return outcome

    def saw(self, who: str, outcome: str) -> None:
        """Notes an outcome."""
        self.outcomes.append((who, outcome))

    def _outcome(self, reply: dict[str, Any] | None, prompt: Prompt) -> str:
        expected = self.expected[prompt]
        if reply is None:
            status = self.decode.end()
            self.decode, self._ready = Helper("decode_side.py"), False
            return KILLED if status == -signal.SIGKILL else f"exit status {status}"
        for layer, digest in reply["layers"].items():
            if int(layer) >= len(expected) or expected[int(layer)] != digest:
                return WRONG
        if "cache" in reply:
            return RIGHT if reply["cache"] == expected else WRONG
        if "exception" in reply:
            self.notes.append(reply["exception"])
            return "exception"
        return LEFT if "left" in reply else str(reply["code"])

    # ---- pbs-decode

    def pbs_decode(self, ticket: KvTicket, target: str) -> str:
        """The tokens that pbs-decode makes of a held cache, or the code of its error.

        The first token comes from a file: that of a description has no checksum.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = {"ticket": ticket.to_json(), "then-tokens": "[7]"}
            command = [str(program("pbs-decode")), "--server", target]
            for name, text in files.items():
                path = pathlib.Path(folder) / name
                path.write_text(text)
                command += [f"--{name}", str(path)]
            command += ["--model-path", str(self.model), "--max-new-tokens", "4"]
            command += ["--ignore-eos", "--ignore-endpoint", "--threads", "1", "--json"]
            command += ["--quiet", "--timeout", str(CALL_SECONDS_MAX)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return str(json.loads(done.stdout)["tokens"])
        code = re.search(r"\b([A-Z][A-Z_]+[A-Z])\b", done.stderr)
        if done.returncode != 1 or code is None:
            self.notes.append(done.stderr)
            return f"exit status {done.returncode}"
        return code.group(1)

    # ---- the relay

    def open_relay(self, *plans: dict[str, Any]) -> int:
        """A port of the relay to the node."""
        return int(self.relay.ask("open", server=self.node.target, plans=plans)["port"])

    def open_relay_to_sink(self, plan: dict[str, Any]) -> None:
        """Puts the relay between the node and the decode side's sink."""
        port = int(self.relayed_sink.rpartition(":")[2])
        self.relay.ask("open", server=self.sink, plans=[plan], port=port)

    def came_to_hold(self) -> bool:
        """Waits for a fetch to come to the hold; False: it ended before."""
        return bool(self.relay.ask("held")["held"])

    def close_relay(self) -> None:
        """Ends its connections and counts what it did to them."""
        counts = self.relay.ask("close")
        self.notes.append(f"the relay saw {counts}")
        self.hits += counts["faults"]


@dataclass(frozen=True)
class AtLayer:
    """A callback that does its work when the news of a layer comes."""

    layer: int
    work: Callable[[], None]

    def __call__(self, progress: LayerProgress) -> None:
        if progress.index == self.layer:
            self.work()
