"""The faults: how each is brought about, and which outcomes are right.

An outcome is `right` (a whole cache, bit-equal to one without a fault), `killed`, `left`
(the caller ended the call), or the code of a PbsError. Never right are another cache or
layer (`wrong`) and an exception that is no PbsError.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from caches import PROMPTS, Prompt
from fault_processes import LEASE_SECONDS, REPLY_SECONDS_MAX
from lane import (
    CALL_SECONDS_MAX,
    KILLED,
    LEFT,
    NARROW,
    RIGHT,
    WRONG,
    AtLayer,
    Lane,
    LeaveError,
)
from pbs_client import Inline, Lease, NotFoundError, Push

LAYERS = 6  # of the model
UP_BYTES = 900  # those that a decode side sends for a cache
EARLY_BYTES = 2000  # greetings, headers and the description of the cache are in these


def a_byte(lane: Lane, prompt: Prompt) -> int:
    """A byte of a cache, as a count of payload bytes."""
    return lane.rng.randrange(lane.bytes_of[prompt])


def a_wire_byte(lane: Lane, prompt: Prompt) -> int:
    """A byte from the server: a third of them early ones, where little is payload."""
    if lane.rng.random() < 0.33:
        return lane.rng.randrange(EARLY_BYTES)
    return a_byte(lane, prompt)


def end_lease(lane: Lane, ticket: object) -> None:
    """As a decode tier that works, or as one that is gone."""
    if lane.rng.random() < 0.7:
        lane.release(ticket)


# ---- the decode side


def decode_killed(lane: Lane) -> None:
    """The decode side is killed (SIGKILL) at a random byte of a fetch."""
    prompt = lane.prompt()
    ticket = lane.ticket_of(prompt)
    lane.fetch(ticket, stop={"at": a_byte(lane, prompt), "how": "kill"})
    lane.see_decode(prompt)


def decode_hung(lane: Lane) -> None:
    """The decode side stops (SIGSTOP) at a random byte; then it dies or goes on."""
    prompt = lane.prompt()
    ticket = lane.ticket_of(prompt)
    stop = {"at": a_byte(lane, prompt), "how": "hang"}
    lane.fetch(ticket, stop=stop, options=NARROW)
    if not lane.hangs():
        lane.see_decode(prompt)
        return
    lane.settle()  # the time of a lease begins at the end of its prefill
    if not lane.nothing_held():
        lane.saw("decode", "held what it does not read")
    if lane.rng.random() < 0.5:
        lane.decode.process.send_signal(signal.SIGKILL)
    else:
        lane.decode.process.send_signal(signal.SIGCONT)
    lane.see_decode(prompt)


def slow_reader(lane: Lane) -> None:
    """The connection is so slow that a fetch takes up to twice its lease."""
    prompt = lane.prompt()
    rate = int(lane.bytes_of[prompt] / (lane.rng.uniform(1, 2) * LEASE_SECONDS))
    port = lane.open_relay({"rate": rate})
    ticket = lane.ticket_of(prompt)
    lane.fetch(ticket, port, timeout=CALL_SECONDS_MAX * 4, options=NARROW)
    lane.see_decode(prompt)
    lane.close_relay()
    end_lease(lane, ticket)


def fetch_cancelled(lane: Lane) -> None:
    """The caller leaves a fetch at a random byte, or its time runs out."""
    prompt = lane.prompt()
    ticket = lane.ticket_of(prompt)
    if lane.rng.random() < 0.5:
        lane.fetch(ticket, stop={"at": a_byte(lane, prompt), "how": "leave"})
    else:
        lane.fetch(ticket, timeout=lane.rng.uniform(0.001, 0.1))
    lane.see_decode(prompt)
    end_lease(lane, ticket)


# ---- the connection


def connection_cut(lane: Lane) -> None:
    """The connection is cut at random bytes, one to six times, either way."""
    prompt = lane.prompt()
    plans = []
    for _ in range(lane.rng.choice((1, 1, 2, 3, 6))):
        up = lane.rng.random() < 0.2
        at = lane.rng.randrange(UP_BYTES) if up else a_wire_byte(lane, prompt)
        reset = lane.rng.random() < 0.5
        plans.append({"way": "up" if up else "down", "cut_at": at, "reset": reset})
    _through_relay(lane, prompt, plans)


def bit_flipped(lane: Lane) -> None:
    """One bit flips at a random byte of the connection, either way."""
    prompt = lane.prompt()
    up = lane.rng.random() < 0.2
    at = lane.rng.randrange(UP_BYTES) if up else a_wire_byte(lane, prompt)
    plan = {"way": "up" if up else "down", "flip_at": at, "bit": lane.rng.randrange(8)}
    _through_relay(lane, prompt, [plan], inline=not up)


def pbs_decode_disturbed(lane: Lane) -> None:
    """pbs-decode (C++) fetches over a connection that is cut or has a flipped bit."""
    prompt = lane.prompt()
    at = a_wire_byte(lane, prompt)
    plan: dict[str, object] = {"cut_at": at, "reset": lane.rng.random() < 0.5}
    if lane.rng.random() < 0.5:
        plan = {"flip_at": at, "bit": lane.rng.randrange(8)}
    lane.notes.append(f"plan {plan}")
    expected = lane.pbs_decode(lane.hold(prompt), lane.node.target)
    port = lane.open_relay(plan)
    ticket = lane.hold(prompt)
    had = lane.pbs_decode(ticket, f"127.0.0.1:{port}")
    lane.close_relay()
    if had == expected:
        lane.saw("decode", RIGHT)
    else:
        lane.saw("decode", WRONG if had.startswith("[") else had)
    end_lease(lane, ticket)


def _through_relay(
    lane: Lane, prompt: Prompt, plans: list[dict], inline: bool = True
) -> None:
    """A fetch, or an inline prefill, behind a relay that follows plans."""
    lane.notes.append(f"plans {plans}")
    port = lane.open_relay(*plans)
    if inline and lane.rng.random() < 0.25:
        lane.decode.tell(
            "inline",
            target=f"127.0.0.1:{port}",
            prompt=PROMPTS.index(prompt),
            timeout=CALL_SECONDS_MAX,
        )
        lane.see_decode(prompt)
        lane.close_relay()
        return
    ticket = lane.ticket_of(prompt)
    lane.fetch(ticket, port)
    lane.see_decode(prompt)
    lane.close_relay()
    end_lease(lane, ticket)


# ---- the lease


def lease_ends_mid_fetch(lane: Lane) -> None:
    """No byte and no renewal passes until the lease has ended."""
    prompt = lane.prompt()
    port = lane.open_relay({"hold_at": a_byte(lane, prompt)})
    ticket = lane.hold(prompt)
    lane.fetch(ticket, port, options=NARROW)
    if lane.came_to_hold() and not lane.nothing_held():
        lane.saw("decode", "held after its lease")
    lane.relay.ask("go")
    lane.see_decode(prompt)
    lane.close_relay()


def released_mid_fetch(lane: Lane) -> None:
    """Somebody else releases the lease in the middle of a fetch."""
    prompt = lane.prompt()
    port = lane.open_relay({"hold_at": a_byte(lane, prompt)})
    ticket = lane.ticket_of(prompt)
    lane.fetch(ticket, port, options=NARROW)
    lane.came_to_hold()
    lane.release(ticket)
    lane.relay.ask("go")
    lane.see_decode(prompt)
    lane.close_relay()


def lease_ends_under_a_mapping(lane: Lane) -> None:
    """The lease ends while the decode side, stopped (SIGSTOP), maps shared memory."""
    prompt = lane.prompt()
    ticket = lane.ticket_of(prompt)
    stop = {"at": a_byte(lane, prompt), "how": "hang"}
    lane.fetch(ticket, stop=stop, shared_memory=lane.socket)
    if not lane.hangs():
        lane.see_decode(prompt)
        return
    lane.settle()  # the time of a lease begins at the end of its prefill
    if lane.rng.random() < 0.5:
        lane.release(ticket)
    if not lane.nothing_held():
        lane.saw("decode", "held what it maps")
    lane.decode.process.send_signal(signal.SIGCONT)
    lane.see_decode(prompt)


# ---- the prefill


def prefill_cancelled(lane: Lane) -> None:
    """A prefill is cancelled at a random time or layer; a fetch follows it."""
    prompt = lane.prompt()
    delivery = lane.rng.choice((None, Inline(), Lease(), Lease(), Lease()))
    follow = isinstance(delivery, Lease)

    def leave() -> None:
        raise LeaveError

    if lane.rng.random() < 0.5:
        timeout = lane.rng.uniform(0.001, 0.3)
        ticket, ended = lane.begin_prefill(prompt, delivery=delivery, timeout=timeout)
    else:
        on_layer = AtLayer(lane.rng.randrange(LAYERS), leave)
        ticket, ended = lane.begin_prefill(prompt, delivery=delivery, on_layer=on_layer)
    if follow and ticket is not None:
        lane.fetch(ticket)
        lane.see_decode(prompt)
    lane.saw("prefill", ended.result())


# ---- a sink of pushes


def sink_killed(lane: Lane) -> None:
    """The decode side is killed (SIGKILL) at a random layer that is pushed to it."""
    prompt = lane.prompt()
    lane.listen(kill_at=lane.rng.randrange(LAYERS))
    _, ended = lane.begin_prefill(prompt, delivery=Push(lane.sink))
    lane.see_decode(prompt)
    lane.saw("prefill", ended.result())


def sink_cut(lane: Lane) -> None:
    """The connection of a push is cut at a random byte, either way."""
    _push_through_relay(lane, "cut_at", {"reset": lane.rng.random() < 0.5})


def sink_bit_flipped(lane: Lane) -> None:
    """One bit flips at a random byte of the connection of a push, either way."""
    _push_through_relay(lane, "flip_at", {"bit": lane.rng.randrange(8)})


def _push_through_relay(lane: Lane, what: str, how: dict[str, object]) -> None:
    prompt = lane.prompt()
    down = lane.rng.random() < 0.2
    at = lane.rng.randrange(UP_BYTES) if down else a_wire_byte(lane, prompt)
    plan = {"way": "down" if down else "up", what: at, **how}
    lane.notes.append(f"plan {plan}")
    lane.listen()
    lane.open_relay_to_sink(plan)
    _, ended = lane.begin_prefill(prompt, delivery=Push(lane.relayed_sink))
    lane.see_decode(prompt)
    lane.saw("prefill", ended.result())
    lane.close_relay()


# ---- the node


def node_killed_mid_prefill(lane: Lane) -> None:
    """The node is killed (SIGKILL) at a random layer; a fetch follows it."""
    # The news of a layer may come late, and then the prefill is done.
    prompt = lane.prompt()
    kill = AtLayer(lane.rng.randrange(LAYERS), lambda: lane.node.send(signal.SIGKILL))
    ticket, ended = lane.begin_prefill(prompt, on_layer=kill)
    assert ticket is not None
    lane.fetch(ticket)
    lane.see_decode(prompt)
    lane.saw("prefill", ended.result())
    lane.node.end()
    lane.node.start()


def node_killed_mid_fetch(lane: Lane) -> None:
    """The node is killed and starts again at its address in a fetch."""
    prompt = lane.prompt()
    port = lane.open_relay({"hold_at": a_byte(lane, prompt)})
    ticket = lane.hold(prompt)
    lane.fetch(ticket, port, options=NARROW, timeout=REPLY_SECONDS_MAX / 2)
    lane.came_to_hold()
    lane.node.end()
    lane.node.start()
    lane.relay.ask("go")
    lane.see_decode(prompt)
    lane.close_relay()


def node_hung(lane: Lane) -> None:
    """The node stops (SIGSTOP) in a fetch for longer than keepalive allows."""
    prompt = lane.prompt()
    port = lane.open_relay({"hold_at": a_byte(lane, prompt)})
    ticket = lane.hold(prompt)
    impatient = ("keepalive_time_ms", "keepalive_timeout_ms", "http2.ping_timeout_ms")
    options = NARROW + [[f"grpc.{name}", 1000] for name in impatient]
    lane.fetch(ticket, port, options=options, resumes=0)
    lane.came_to_hold()
    lane.node.send(signal.SIGSTOP)
    lane.relay.ask("go")
    lane.see_decode(prompt)
    lane.node.send(signal.SIGCONT)
    lane.close_relay()


def old_tickets(lane: Lane) -> None:
    """Tickets of a killed or drained node come to its successor."""
    prompt = lane.prompt()
    tickets = [lane.hold(prompt) for _ in range(3)]
    lane.node.end(lane.rng.choice((signal.SIGKILL, signal.SIGTERM)))
    lane.node.start()
    lane.fetch(tickets[0])
    lane.see_decode(prompt)
    with lane.client() as client:
        for use in (client.describe, client.renew, client.release):
            try:
                use(tickets[1])
                lane.saw("ticket", "taken")
            except NotFoundError as error:
                lane.saw("ticket", error.code.name)


# ---- the table


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        weight: share of the faults, as a count beside the other weights.
        decode: right outcomes of the decode side.
        others: right outcomes of the other callers.
    """

    bring_about: Callable[[Lane], None]
    weight: int
    decode: frozenset[str]
    others: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name."""
        return self.bring_about.__name__

    @property
    def text(self) -> str:
        """What happens."""
        return str(self.bring_about.__doc__)

    def wrong(self, outcomes: list[tuple[str, str]]) -> list[str]:
        """The outcomes that are not right."""
        allowed = {"decode": self.decode, "producer": _PRODUCER, **self.others}
        return [f"{who}: {what}" for who, what in outcomes if what not in allowed[who]]


def _codes(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The prefill of a fetch that follows it; its lease may be released before it is done.
_PRODUCER = _codes(f"{RIGHT} ABORTED")
# NOT_FOUND: the lease of a second ended before a machine with much to do came to fetch.
_GONE = f"{RIGHT} NOT_FOUND UNAVAILABLE CANCELLED DEADLINE_EXCEEDED"
# A changed bit may make any code of another, or the length of a message too large.
_ANY_ERROR = (
    "DATA_LOSS UNAVAILABLE INTERNAL UNKNOWN CANCELLED DEADLINE_EXCEEDED NOT_FOUND "
    "RESOURCE_EXHAUSTED INVALID_ARGUMENT FAILED_PRECONDITION UNIMPLEMENTED ABORTED "
    "OUT_OF_RANGE PERMISSION_DENIED UNAUTHENTICATED ALREADY_EXISTS"
)

FAULTS = (
    Fault(decode_killed, 3, _codes(f"{KILLED} NOT_FOUND")),
    Fault(decode_hung, 2, _codes(f"{_GONE} {KILLED}")),
    Fault(slow_reader, 1, _codes(f"{RIGHT} NOT_FOUND")),
    Fault(fetch_cancelled, 2, _codes(f"{RIGHT} {LEFT} DEADLINE_EXCEEDED NOT_FOUND")),
    Fault(connection_cut, 4, _codes(f"{RIGHT} UNAVAILABLE NOT_FOUND")),
    Fault(bit_flipped, 5, _codes(f"{RIGHT} {_ANY_ERROR}")),
    Fault(pbs_decode_disturbed, 2, _codes(f"{RIGHT} {_ANY_ERROR}")),
    Fault(lease_ends_mid_fetch, 1, _codes(_GONE)),
    Fault(released_mid_fetch, 1, _codes(f"{RIGHT} NOT_FOUND")),
    Fault(lease_ends_under_a_mapping, 2, _codes(_GONE)),
    Fault(
        prefill_cancelled,
        3,
        _codes(f"{RIGHT} UNAVAILABLE NOT_FOUND"),
        {"prefill": _codes(f"{RIGHT} {LEFT} DEADLINE_EXCEEDED")},
    ),
    Fault(sink_killed, 1, _codes(KILLED), {"prefill": _codes("UNAVAILABLE")}),
    Fault(
        sink_cut,
        2,
        # A connection that is cut before the call brings the sink nothing.
        _codes(f"{RIGHT} CANCELLED DEADLINE_EXCEEDED"),
        {"prefill": _codes(f"{RIGHT} UNAVAILABLE")},
    ),
    Fault(
        sink_bit_flipped,
        2,
        _codes(f"{RIGHT} {_ANY_ERROR}"),
        {"prefill": _codes(f"{RIGHT} {_ANY_ERROR}")},
    ),
    Fault(
        node_killed_mid_prefill,
        1,
        _codes(f"{RIGHT} UNAVAILABLE"),
        {"prefill": _codes(f"{RIGHT} UNAVAILABLE")},
    ),
    Fault(node_killed_mid_fetch, 1, _codes(f"{RIGHT} NOT_FOUND UNAVAILABLE")),
    Fault(node_hung, 1, _codes("UNAVAILABLE NOT_FOUND")),
    Fault(old_tickets, 1, _codes("NOT_FOUND"), {"ticket": _codes("NOT_FOUND")}),
)
