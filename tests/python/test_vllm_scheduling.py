"""Which requests of vLLM load what, and when their leases are dropped."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pbs_client import KvTicket
from pbs_client.kv import Span
from pbs_client.kv_params import KvTransferParams, prompt_digest
from pbs_client.vllm.scheduler_side import EnginePolicy, SchedulerSide
from pbs_client.vllm.settings import Settings

BLOCK = 4
PROMPT = list(range(10))
TICKET = KvTicket("0" * 32, 7, "model", "exact", "prefill:1")


class RecordedLeases:
    """The numbers of holds and drops of each ticket."""

    def __init__(self) -> None:
        self.held: list[KvTicket] = []
        self.dropped: list[KvTicket] = []

    def hold(self, ticket: KvTicket) -> None:
        self.held.append(ticket)

    def drop(self, ticket: KvTicket) -> None:
        self.dropped.append(ticket)


@dataclasses.dataclass
class Request:
    request_id: str = "r"
    prompt_token_ids: list[int] = dataclasses.field(
        default_factory=lambda: list(PROMPT)
    )
    num_tokens: int = len(PROMPT)
    kv_transfer_params: Any = None
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: Any = ()
    prompt_embeds: Any = None


def with_handoff(prompt=None, request_id: str = "r", **changes: Any) -> Request:
    """A request for PROMPT with the cache of a prompt."""
    ids = PROMPT if prompt is None else prompt
    params = KvTransferParams(TICKET, len(ids), prompt_digest(ids), 0, 1)
    given = {**params.to_json_object(), **changes}
    return Request(request_id, kv_transfer_params=given)


def make(fails: bool = True, **settings: Any) -> tuple[SchedulerSide, RecordedLeases]:
    leases = RecordedLeases()
    given = Settings.from_extra_config({"endpoints": ["prefill:1"], **settings})
    return SchedulerSide(given, EnginePolicy(BLOCK, True, fails), leases), leases


def admit(side: SchedulerSide, request: Request, computed: int = 0, blocks=(5, 6, 7)):
    """One scheduling of a request: the tokens it loads, and the orders."""
    tokens = side.matched_tokens(request, computed)
    side.allocated(request, blocks, tokens)
    return tokens, side.take_orders()


def test_a_request_without_hand_off_loads_nothing():
    side, leases = make()
    side.on_new_request(Request())
    assert admit(side, Request()) == (0, [])
    side.finished("r")
    assert leases.held == []


@pytest.mark.parametrize(
    ("cached", "computed", "tokens", "blocks"),
    [
        pytest.param(10, 0, Span(0, 9), (5, 6, 7), id="all but the last token"),
        pytest.param(9, 0, Span(0, 9), (5, 6, 7), id="the cache of one token less"),
        pytest.param(8, 0, Span(0, 8), (5, 6), id="the cache of whole blocks"),
        pytest.param(10, 4, Span(4, 5), (6, 7), id="what the prefix cache lacks"),
        pytest.param(10, 8, Span(8, 1), (7,), id="one token"),
    ],
)
def test_a_request_loads_what_vllm_lacks_and_leaves_a_token(
    cached, computed, tokens, blocks
):
    side, leases = make()
    request = with_handoff(PROMPT[:cached])
    side.on_new_request(request)
    count, (order,) = admit(side, request, computed)
    assert count == tokens.count
    assert (order.tokens, order.blocks, order.prompt_tokens) == (tokens, blocks, cached)
    assert (order.ticket, order.refusal) == (TICKET, "")
    assert side.take_orders() == []
    assert leases.dropped == []


def test_a_ticket_that_is_not_needed_is_only_released():
    side, leases = make()
    request = with_handoff(PROMPT[:8])
    side.on_new_request(request)
    assert admit(side, request, 8) == (0, [])
    side.finished("r")
    assert leases.dropped == [TICKET]


def test_a_lease_is_held_from_arrival_until_the_request_ends():
    side, leases = make()
    request = with_handoff()
    side.on_new_request(request)
    assert leases.held == [TICKET]
    admit(side, request)
    side.loaded({"r"}, ())
    assert leases.dropped == []
    side.finished("r")
    side.finished("r")
    assert leases.dropped == [TICKET]


def test_a_lease_can_be_dropped_after_the_load():
    side, leases = make(release="load")
    request = with_handoff()
    side.on_new_request(request)
    admit(side, request)
    assert leases.dropped == []
    side.loaded({"r"}, ())
    assert leases.dropped == [TICKET]
    assert side.matched_tokens(request, 0) == 0  # after a preemption
    side.finished("r")
    assert leases.dropped == [TICKET]


def test_a_request_that_was_preempted_loads_its_prompt_again():
    side, _ = make()
    request = with_handoff()
    side.on_new_request(request)
    _, (first,) = admit(side, request)
    side.loaded({"r"}, ())
    request.num_tokens += 3  # it has answered some tokens
    count, (again,) = admit(side, request, 0, (1, 2, 3, 4))
    assert count == len(PROMPT)  # the last one, too: a later token is computed
    assert (again.ticket, again.blocks) == (first.ticket, (1, 2, 3))


def test_a_request_whose_load_failed_does_not_load_again():
    side, leases = make(fails=False)
    request, other = with_handoff(), with_handoff(request_id="other")
    for each, blocks in ((request, (5, 6, 7)), (other, (1, 2, 3))):
        side.on_new_request(each)
        admit(side, each, 0, blocks)
    side.loaded({"r"}, {6})
    assert leases.dropped == [TICKET]
    assert side.matched_tokens(request, 0) == 0
    assert side.matched_tokens(other, 0) == 9


REFUSED = [
    pytest.param(with_handoff([1, *PROMPT[1:]]), True, id="another prompt"),
    pytest.param(with_handoff(endpoint="evil:1"), False, id="another server"),
    pytest.param(with_handoff(ticket=5), False, id="a wrong field"),
    pytest.param(with_handoff(sparsity_digest="pbs-0"), True, id="approximate"),
]


@pytest.mark.parametrize(("request_", "holds"), REFUSED)
def test_a_refused_hand_off_fails_without_a_load_by_the_policy_fail(request_, holds):
    side, leases = make()
    side.on_new_request(request_)
    count, (order,) = admit(side, request_)
    assert (count, order.blocks) == (1, (5,))
    assert order.refusal
    assert bool(leases.held) == holds
    assert leases.held == leases.dropped


@pytest.mark.parametrize(("request_", "holds"), REFUSED)
def test_a_refused_hand_off_is_computed_by_the_policy_recompute(request_, holds):
    side, leases = make(fails=False)
    side.on_new_request(request_)
    assert admit(side, request_) == (0, [])
    assert leases.held == leases.dropped


def test_a_refused_hand_off_of_which_vllm_has_all_is_ignored():
    side, _ = make()
    request = with_handoff([1, *PROMPT[1:]])
    request.num_tokens = 9
    side.on_new_request(request)
    assert admit(side, request, 8) == (0, [])


def test_requests_that_vllm_itself_refused_release_their_lease():
    """It announces them with another prompt and ends them at once."""
    side, leases = make()
    request = with_handoff()
    request.prompt_token_ids, request.num_tokens = [0], 1
    side.on_new_request(request)
    side.finished("r")
    assert leases.dropped == [TICKET]


@pytest.mark.parametrize("params", [7, "x", {"do_remote_prefill": True}, [[]]])
def test_nothing_in_the_parameters_raises(params):
    side, _ = make(fails=False)
    request = Request(kv_transfer_params=params)
    side.on_new_request(request)
    assert admit(side, request) == (0, [])
    side.finished("r")
