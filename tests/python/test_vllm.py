"""vLLM answers from caches of pbs-prefilld as from its own prefill."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from eventually import until
from pbs_client import Pbs
from real_server import REPOSITORY, program

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed: scripts/check.sh vllm")

import torch  # noqa: E402
import transformers  # noqa: E402
from vllm_server import BLOCK_SIZE, RUNNING, SLOTS, in_threads  # noqa: E402
from vllm_world import params_of  # noqa: E402

sys.path.insert(0, str(REPOSITORY / "tests/quality"))
import recall_task  # noqa: E402

HITS = "vllm:external_prefix_cache_hits_total"
PREEMPTIONS = "vllm:num_preemptions_total"
LLAMA = pytest.mark.parametrize("world", ["llama, fail"], indirect=True)
RECALL = pytest.mark.parametrize("world", ["recall, fail, two ranks"], indirect=True)


@pytest.mark.parametrize(
    "count",
    [
        *(2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1),
        *(255, 256, 257, 991, 992, 993),
    ],
)
def test_greedy_tokens_equal_those_of_vllms_own_prefill(world, count):
    prompt = world.prompt(count, count)
    ticket, params = world.handoff(prompt)
    answer = world.vllm.complete(prompt, params)
    assert answer.tokens == world.expected(prompt)
    assert answer.cached_tokens == count - 1  # all but the token that it must compute
    until(lambda: not world.is_held(ticket))


@pytest.mark.parametrize("count", [BLOCK_SIZE, BLOCK_SIZE + 1, 257])
def test_a_cache_without_the_last_token_serves_as_well(world, count):
    prompt = world.prompt(count, count)
    _, params = world.handoff(prompt[:-1])
    answer = world.vllm.complete(prompt, params)
    assert answer.tokens == world.expected(prompt)
    assert answer.cached_tokens == count - 1


@pytest.mark.parametrize("count", [1, 33, 992])
def test_vllms_own_tokens_are_those_of_transformers(world, count):
    """Else the other tests could compare what is wrong with what is wrong."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        world.folder, dtype=torch.float32
    )
    prompt = torch.tensor([world.prompt(count, count)])
    with torch.no_grad():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
            eos_token_id=None,
        )
    assert output[0, count:].tolist() == world.expected(prompt[0].tolist())


def test_a_prompt_of_one_token_needs_no_cache(world):
    prompt = world.prompt(1, 1)
    ticket, params = world.handoff(prompt)
    assert world.vllm.complete(prompt, params).tokens == world.expected(prompt)
    until(lambda: not world.is_held(ticket))


def test_an_answer_can_be_streamed(world):
    prompt = world.prompt(70, 300)
    _, params = world.handoff(prompt)
    events = world.vllm.stream(prompt, params)
    assert [t for event in events for t in event] == world.expected(prompt)
    assert len(events) > 1


def test_eight_requests_at_once_do_not_mix(world):
    prompts = [world.prompt(80 + index, 200 + 33 * index) for index in range(8)]
    expected = [world.expected(prompt) for prompt in prompts]
    params = [world.handoff(prompt)[1] for prompt in prompts]
    calls = [
        lambda prompt=prompt, given=given: world.vllm.complete(prompt, given)
        for prompt, given in zip(prompts, params)
    ]
    answers = in_threads(calls)
    assert [answer.tokens for answer in answers] == expected
    assert [a.cached_tokens for a in answers] == [len(p) - 1 for p in prompts]


def test_a_load_follows_a_prefill_that_still_runs(world):
    prompt = world.prompt(90, 1000)
    expected = world.expected(prompt)
    admitted, ticket = threading.Event(), []

    def on_admitted(_, given):
        ticket.append(given)
        admitted.set()

    def prefill():
        return world.client.prefill(
            "m", prompt, "dense", delivery="lease", on_admitted=on_admitted
        )

    def decode():
        assert admitted.wait(30)
        return world.vllm.complete(prompt, params_of(ticket[0], prompt))

    done, answer = in_threads([prefill, decode])
    assert answer.tokens == expected
    assert answer.cached_tokens == 999
    assert done.first_token == expected[0]


def test_a_prefix_that_vllm_has_is_not_loaded_again(world):
    prompt = world.prompt(100, 5 * BLOCK_SIZE + 7)
    longer = [*prompt[: 3 * BLOCK_SIZE], *world.prompt(101, 300)]
    expected = [world.expected(prompt), world.expected(longer)]
    before = world.vllm.metric(HITS)
    answers = [
        world.vllm.complete(given, world.handoff(given)[1], cache_salt="prefix")
        for given in (prompt, longer)
    ]
    assert [answer.tokens for answer in answers] == expected
    loaded = world.vllm.metric(HITS) - before
    assert loaded == (len(prompt) - 1) + (len(longer) - 1 - 3 * BLOCK_SIZE)


def test_the_cache_of_the_beginning_of_a_prompt_serves_it(world):
    prompt = world.prompt(110, 300)
    _, params = world.handoff(prompt[:200])
    answer = world.vllm.complete(prompt, params)
    assert answer.tokens == world.expected(prompt)
    assert answer.cached_tokens == 200


def test_several_answers_share_one_ticket(world):
    prompt = world.prompt(120, 150)
    ticket, params = world.handoff(prompt)
    # Equal answers of one request: greedy decoding allows only one, so no temperature.
    with world.vllm.request(prompt, params, n=3, temperature=1e-5) as connection:
        response = connection.getresponse()
        assert response.status == 200, response.read()
    until(lambda: not world.is_held(ticket))


@LLAMA
def test_a_preempted_request_loads_again_and_answers_the_same(world):
    prompts = [world.prompt(130 + index, 700) for index in range(4)]
    expected = [world.expected(prompt, 700) for prompt in prompts]
    params = [world.handoff(prompt)[1] for prompt in prompts]
    preemptions = world.vllm.metric(PREEMPTIONS)
    calls = [
        lambda prompt=prompt, given=given: world.vllm.complete(prompt, given, 700)
        for prompt, given in zip(prompts, params)
    ]
    answers = in_threads(calls)
    assert world.vllm.metric(PREEMPTIONS) > preemptions
    assert [answer.tokens for answer in answers] == expected


@RECALL
def test_a_lease_outlives_the_time_that_its_request_waits(world):
    prompt = world.prompt(140, 200)
    expected = world.expected(prompt)
    with contextlib.ExitStack() as others:
        for index in range(SLOTS):
            other = world.prompt(150 + index, 20)
            others.enter_context(world.vllm.request(other, None, 2000))
        until(lambda: world.vllm.metric(RUNNING) == SLOTS)
        ticket, params = world.handoff(prompt, ttl_seconds=1)
        waiting = others.enter_context(contextlib.ExitStack())
        request = waiting.enter_context(world.vllm.request(prompt, params))
        end = time.monotonic() + 3  # three times its time
        until(lambda: time.monotonic() > end or not world.is_held(ticket))
        assert world.is_held(ticket)
        assert world.vllm.metric(RUNNING) == SLOTS
        kept = waiting.pop_all()
    with kept:  # the others have hung up
        answer = world.vllm.answer(request)
    assert answer.tokens == expected
    assert answer.cached_tokens == len(prompt) - 1


@RECALL
def test_an_approximate_cache_answers_as_well_as_the_server(world):
    prompts = recall_task.make_prompts(np.random.default_rng(2), 16, 1500, 64, 8)
    right = 0
    for tokens, answers in zip(prompts.tokens, prompts.answers):
        prompt = tokens[:-1].tolist()  # ends with the last key that is asked
        ticket, params = world.handoff(prompt, Pbs(threshold=0.9))
        answer = world.vllm.complete(
            prompt, params, new_tokens=1, cache_salt=ticket.sparsity_digest
        )
        assert answer.cached_tokens == len(prompt) - 1
        right += answer.tokens == [answers[-1]]
    assert right >= 15


@RECALL
def test_pbs_through_vllm_answers_as_pbs_decode_does(world, tmp_path):
    prompts = recall_task.make_prompts(np.random.default_rng(3), 8, 1500, 64, 8)
    through_vllm, through_decode, right = [], [], []
    for tokens, answers in zip(prompts.tokens, prompts.answers):
        prompt = tokens[:-1].tolist()
        ticket, params = world.handoff(prompt, Pbs(threshold=0.9))
        salt = ticket.sparsity_digest
        answer = world.vllm.complete(prompt, params, new_tokens=1, cache_salt=salt)
        assert answer.cached_tokens == len(prompt) - 1
        through_vllm += answer.tokens
        through_decode += decoded(world, prompt, tmp_path)
        right.append(int(answers[-1]))
    assert through_vllm == through_decode
    assert sum(a == b for a, b in zip(through_vllm, right)) >= 7


def decoded(world, prompt, folder):
    """The first token of pbs-decode, which fetches a cache of its own."""
    (folder / "prompt.json").write_text(json.dumps(prompt))
    subprocess.run(
        [
            *(str(program("pbs-decode")), "--server", world.prefill.target),
            *("--model", "m", "--model-path", str(world.folder)),
            *("--tokens", str(folder / "prompt.json"), "--max-new-tokens", "1"),
            *("--method", "pbs", "--threshold", "0.9"),
            *("--output", str(folder / "tokens.json")),
        ],
        check=True,
        capture_output=True,
    )
    return json.loads((folder / "tokens.json").read_text())
