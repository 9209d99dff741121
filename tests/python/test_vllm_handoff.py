"""The vLLM connector believes nothing of kv_transfer_params, and no unknown setting."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pbs_client import KvTicket
from pbs_client.kv_params import KvTransferParams, prompt_digest
from pbs_client.vllm.endpoints import AllowList, EndpointError, check_endpoint
from pbs_client.vllm.handoff import HandoffError, check_handoff, read_handoff
from pbs_client.vllm.settings import Settings

PROMPT = list(range(40))
SPARSE = "pbs-0123456789abcdef0123456789abcdef"
TICKET = KvTicket("0" * 31 + "a", 7, "model", "exact", "10.0.0.7:50051")


def settings(**changes: Any) -> Settings:
    return Settings.from_extra_config({"endpoints": ["10.0.0.0/8:50051"], **changes})


def params(of: KvTicket = TICKET, prompt=None, **changes: Any) -> dict[str, Any]:
    ids = PROMPT if prompt is None else prompt
    given = KvTransferParams(of, len(ids), prompt_digest(ids), 0, 1)
    return {**given.to_json_object(), **changes}


@dataclasses.dataclass
class Request:
    prompt_token_ids: list[int] | None = dataclasses.field(
        default_factory=lambda: list(PROMPT)
    )
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: Any = ()
    prompt_embeds: Any = None
    request_id: str = "a request"
    num_tokens: int = 40
    kv_transfer_params: Any = None


def check(ticket=TICKET, request=None, prefix_caching=True, prompt=None, **changes):
    given = settings(**changes)
    handoff = read_handoff(params(ticket, prompt), given)
    check_handoff(handoff, request or Request(), given, prefix_caching)


# ---- settings


def test_settings_have_defaults_and_take_what_is_given():
    assert settings().release == "finish"
    assert not settings().dedicated
    assert settings().wire_dtype == ""
    assert settings(wire_dtype="f8_e4m3", dedicated=True).wire_dtype == "f8_e4m3"
    given = settings(load_threads=2, load_seconds_max=10, dedicated=True)
    assert (given.load_threads, given.load_seconds_max, given.dedicated) == (
        *(2, 10),
        True,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({}, "names no server", id="no server"),
        pytest.param({"endpoints": []}, "names no server", id="an empty list"),
        pytest.param({"endpoint": []}, "endpoint is no setting", id="a wrong name"),
        pytest.param({"endpoints": "a:1"}, "not a list", id="a string for a list"),
        pytest.param({"endpoints": [1]}, "not a list of strings", id="a number"),
        pytest.param({"endpoints": ["a:1"] * 257}, "257 patterns", id="too many"),
        pytest.param({"endpoints": ["unix:/s"]}, "no pattern", id="a scheme"),
        pytest.param({"endpoints": ["10.*:50051"]}, "no pattern", id="a star inside"),
        pytest.param({"server": "dns:///a:1"}, "server", id="server with a scheme"),
        pytest.param({"server": 1}, "server", id="server that is no string"),
        pytest.param({"load_threads": 0}, "outside", id="no threads"),
        pytest.param({"load_threads": 65}, "outside", id="too many threads"),
        pytest.param({"load_threads": 1.5}, "not an integer", id="half a thread"),
        pytest.param({"load_threads": True}, "not an integer", id="a truth"),
        pytest.param({"load_seconds_max": 0}, "outside", id="no time"),
        pytest.param({"load_seconds_max": "9"}, "not a number", id="time as text"),
        pytest.param({"load_bytes_max": 1}, "outside", id="no memory"),
        pytest.param({"call_seconds_max": 61}, "outside", id="a long call"),
        pytest.param({"dedicated": "yes"}, "true or false", id="dedicated as text"),
        pytest.param({"release": "never"}, "finish, load", id="an unknown release"),
        pytest.param({"model_digest": "m" * 129}, "at most 128", id="a long digest"),
        pytest.param({"wire_dtype": "f8"}, "wire_dtype is not f8_e4m3", id="a form"),
        pytest.param(
            {"wire_dtype": "f8_e4m3"}, "f8_e4m3 needs dedicated true", id="a shared engine"
        ),
        pytest.param(
            {"wire_dtype": "f8_e4m3", "dedicated": False},
            "f8_e4m3 needs dedicated true",
            id="an engine that is said to be shared",
        ),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(given, message):
    base = {} if not given or "endpoint" in str(given) else {"endpoints": ["*:*"]}
    with pytest.raises(ValueError, match=message) as error:
        Settings.from_extra_config({**base, **given})
    assert "kv_connector_extra_config" in str(error.value)


# ---- endpoints


@pytest.mark.parametrize(
    ("pattern", "endpoint"),
    [
        ("10.0.0.0/8:50051", "10.200.0.7:50051"),
        ("10.0.0.7:50051", "10.0.0.7:50051"),
        ("10.0.0.7:*", "10.0.0.7:1"),
        ("[fd00::/8]:50051", "[fd00::7]:50051"),
        ("[::1]:50051", "[0:0::1]:50051"),
        ("prefill.example:50051", "Prefill.Example:50051"),
        ("*.prefill.svc:50051", "node-1.prefill.svc:50051"),
        ("*:50051", "anything:50051"),
        ("*:*", "10.0.0.7:1"),
    ],
)
def test_a_listed_server_is_allowed(pattern, endpoint):
    AllowList(["other:1", pattern]).check(endpoint)


@pytest.mark.parametrize(
    ("pattern", "endpoint"),
    [
        ("10.0.0.0/8:50051", "11.0.0.7:50051"),
        ("10.0.0.0/8:50051", "10.0.0.7:50052"),
        ("10.0.0.0/8:*", "10.evil.example:50051"),
        ("prefill.example:50051", "prefill.example.evil:50051"),
        ("*.prefill.svc:50051", "prefill.svc:50051"),
        ("*.prefill.svc:50051", "evilprefill.svc:50051"),
        ("localhost:50051", "127.0.0.1:50051"),
    ],
)
def test_another_server_is_not_allowed(pattern, endpoint):
    with pytest.raises(EndpointError, match="not in the connector's list"):
        AllowList([pattern]).check(endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        *("", ":", "a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:1x", "a:٣"),
        *("unix:/tmp/socket", "dns:///a:1", "ipv4:10.0.0.7:1", "xds:a:1"),
        *("a b:1", "a/b:1", "user@a:1", "-a:1", "a..b:1", "fd00::7:1", "[a]b:1"),
        *("127.1:1", "0x7f000001:1", "2130706433:1", "a\n:1", "a" * 300 + ":1"),
    ],
)
def test_what_is_not_host_and_port_is_no_endpoint(endpoint):
    with pytest.raises(EndpointError):
        check_endpoint(endpoint)
    with pytest.raises(EndpointError):
        AllowList(["*:*"]).check(endpoint)


# ---- kv_transfer_params


@pytest.mark.parametrize(
    "given", [None, {}, [], "text", {"do_remote_prefill": False}, {"x": 1}]
)
def test_a_request_without_a_hand_off_is_an_ordinary_one(given):
    assert read_handoff(given, settings()) is None


def test_a_hand_off_is_read():
    handoff = read_handoff(params(), settings())
    assert handoff is not None
    assert (handoff.ticket, handoff.tokens) == (TICKET, 40)


def test_a_ticket_without_endpoint_is_of_the_server_of_the_settings():
    own = settings(server="prefill:50051")
    ticket = dataclasses.replace(TICKET, endpoint="")
    handoff = read_handoff(params(ticket), own)
    assert handoff is not None
    assert handoff.ticket.endpoint == "prefill:50051"
    with pytest.raises(HandoffError, match="set kv_connector_extra_config server"):
        read_handoff(params(ticket), settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"ticket": None}, "ticket is not a string", id="no ticket"),
        pytest.param({"ticket": "xyz"}, "32 hex digits", id="a short ticket"),
        pytest.param({"ticket": "\ud800" * 32}, "32 hex digits", id="a surrogate"),
        pytest.param({"epoch": 7}, "epoch", id="epoch as a number"),
        pytest.param({"epoch": "9" * 5000}, "integer|epoch", id="a huge epoch"),
        pytest.param({"tokens": -1}, "tokens", id="negative tokens"),
        pytest.param({"tokens": True}, "tokens", id="a truth"),
        pytest.param({"sparsity_digest": ""}, "sparsity_digest", id="no digest"),
        pytest.param({"model_digest": "m" * 200}, "model_digest", id="a long digest"),
        pytest.param({"endpoint": "169.254.169.254:80"}, "list", id="another server"),
        pytest.param({"endpoint": "unix:/run/x"}, "endpoint", id="a socket"),
    ],
)
def test_a_wrong_field_is_refused(changes, message):
    with pytest.raises(HandoffError, match=message):
        read_handoff(params(**changes), settings())


# ---- the request


def test_the_cache_of_the_prompt_or_of_its_beginning_is_accepted():
    check()
    check(prompt=PROMPT[:13])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        pytest.param([*PROMPT[:-1], 99], "another prompt", id="another last token"),
        pytest.param([99, *PROMPT[1:]], "another prompt", id="another first token"),
        pytest.param([*PROMPT, 1], "40 tokens", id="a longer cache"),
        pytest.param([], "tokens is 0", id="an empty cache"),
    ],
)
def test_the_cache_of_another_prompt_is_refused(prompt, message):
    with pytest.raises(HandoffError, match=message):
        check(prompt=prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_embeds": object()}, "prompt_embeds"),
        ({"mm_features": [object()]}, "multimodal"),
        ({"lora_request": object()}, "LoRA"),
        ({"prompt_token_ids": None}, "no prompt ids"),
    ],
)
def test_a_request_that_a_prefill_server_does_not_know_is_refused(changes, message):
    with pytest.raises(HandoffError, match=message):
        check(request=dataclasses.replace(Request(), **changes))


def test_the_cache_of_another_model_is_refused_by_its_digest():
    check(model_digest="model")
    with pytest.raises(HandoffError, match="model_digest"):
        check(model_digest="another")


# ---- approximate caches


SPARSE_TICKET = dataclasses.replace(TICKET, sparsity_digest=SPARSE)


@pytest.mark.parametrize(
    "salt", [None, "", "exact", SPARSE + "0", SPARSE[:-1]], ids=repr
)
def test_an_approximate_cache_without_its_salt_is_refused(salt):
    with pytest.raises(HandoffError, match=r"cache_salt.*dedicated.*prefix-caching"):
        check(SPARSE_TICKET, Request(cache_salt=salt))


def test_an_approximate_cache_that_nobody_can_mistake_is_accepted():
    check(SPARSE_TICKET, Request(cache_salt=SPARSE))
    check(SPARSE_TICKET, dedicated=True)
    check(SPARSE_TICKET, prefix_caching=False)


@pytest.mark.parametrize("digest", ["exact", "exact-0123"])
def test_an_exact_cache_needs_no_salt(digest):
    check(dataclasses.replace(TICKET, sparsity_digest=digest))


@pytest.mark.parametrize("digest", ["exactly", "Exact", " exact"])
def test_only_exact_is_exact(digest):
    with pytest.raises(HandoffError, match="approximate"):
        check(dataclasses.replace(TICKET, sparsity_digest=digest))
