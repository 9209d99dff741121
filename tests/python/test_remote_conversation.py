"""Turns of a conversation, and scores of continuations, over a remote prefill."""

from __future__ import annotations

import numpy as np
import pytest
from real_server import running_server

pytestmark = pytest.mark.peers

NEW_TOKENS, CONTINUE_TOKENS_MAX = 12, 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import word_tokenizer

    return word_tokenizer.make(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(hf, folder):
    return hf.load_model(folder, dtype="f32")


@pytest.fixture(scope="module")
def remote(hf, model, folder):
    with (
        running_server(f"--model=tiny={folder}") as server,
        hf.RemotePrefill(
            model,
            server.target,
            attention="dense",
            continue_tokens_max=CONTINUE_TOKENS_MAX,
        ) as connected,
    ):
        yield connected


def words(count, seed):
    picked = np.random.default_rng(seed).integers(0, 300, count)
    return " ".join(f"w{index}" for index in picked)


def asked(tokenizer, messages):
    """The conversation as ids, with the beginning of the answer."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def answered(model, tokenizer, messages, cache=None):
    """The tokens of the answer; the messages get it."""
    inputs = asked(tokenizer, messages)
    more = {} if cache is None else {"past_key_values": cache}
    output = model.generate(
        **inputs, **more, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=319
    )
    answer = output[0, inputs["input_ids"].shape[1] :]
    messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
    return answer.tolist()


TURNS = {
    # tokens of the second question, where it is prefilled
    "a short turn goes on here": (5, 0),
    "the longest turn that goes on here": (CONTINUE_TOKENS_MAX - 5, 0),
    "a longer turn is prefilled at the server": (CONTINUE_TOKENS_MAX - 4, 1),
    "a long turn is prefilled at the server": (200, 1),
}


@pytest.mark.parametrize(("tokens", "sent"), TURNS.values(), ids=TURNS)
def test_three_turns_over_one_cache_are_transformers_own(
    torch, model, tokenizer, remote, tokens, sent
):
    from transformers import DynamicCache

    own, ours = [], []
    cache = DynamicCache()
    for question, prefills in ((120, 1), (tokens, sent), (5, 0)):
        for messages in (own, ours):
            content = words(question, question)
            messages.append({"role": "user", "content": content})
        expected = answered(model, tokenizer, own)
        assert answered(remote, tokenizer, ours, cache) == expected
        assert len(remote.prefills) == prefills
        width = asked(tokenizer, ours[:-1])["input_ids"].shape[1]
        assert cache.get_seq_length() == width + len(expected) - 1


def test_without_a_cache_each_turn_is_prefilled_at_the_server(model, tokenizer, remote):
    own, ours = [], []
    for question in (50, 5):
        for messages in (own, ours):
            messages.append({"role": "user", "content": words(question, question)})
        expected = answered(model, tokenizer, own)
        assert answered(remote, tokenizer, ours) == expected
        assert len(remote.prefills) == 1


def test_a_conversation_that_was_edited_is_prefilled_again(model, tokenizer, remote):
    from transformers import DynamicCache

    cache = DynamicCache()
    messages = [{"role": "user", "content": words(100, 1)}]
    answered(remote, tokenizer, messages, cache)
    messages[1]["content"] = words(NEW_TOKENS, 2)  # as templates that cut thoughts do
    messages.append({"role": "user", "content": words(3, 3)})
    expected = answered(model, tokenizer, list(messages))
    assert answered(remote, tokenizer, messages, cache) == expected
    assert len(remote.prefills) == 1


def test_the_cache_of_a_result_goes_on_too(torch, model, tokenizer, remote):
    messages = [{"role": "user", "content": words(100, 1)}]
    inputs = asked(tokenizer, messages)
    output = remote.generate(
        **inputs, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, pad_token_id=319
    )
    cache = output["cache"] if "cache" in output else output["past_key_values"]
    ids = torch.cat([output.sequences, torch.tensor([[5, 6, 7]])], 1)
    arguments = {"attention_mask": torch.ones_like(ids), "pad_token_id": 319}
    own = model.generate(ids, max_new_tokens=NEW_TOKENS, **arguments)
    ours = remote.generate(
        ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, **arguments
    )
    assert remote.prefills == ()
    assert ours.tolist() == own.tolist()


def test_the_ids_may_be_those_of_the_new_turn_alone(torch, model, tokenizer, remote):
    from transformers import DynamicCache

    if not hasattr(model, "_prefill"):
        pytest.skip("this transformers takes all ids of a conversation only")
    cache = DynamicCache()
    first = asked(tokenizer, [{"role": "user", "content": words(100, 1)}])
    arguments = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 319}
    output = remote.generate(**first, **arguments, past_key_values=cache)
    turn = torch.tensor([[5, 6, 7]])
    ids = torch.cat([output, turn], 1)
    own = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    last = torch.cat([output[:, -1:], turn], 1)  # its token is not in the cache yet
    ours = remote.generate(
        last, attention_mask=torch.ones_like(ids), past_key_values=cache, **arguments
    )
    assert ours[0, last.shape[1] :].tolist() == own[0, ids.shape[1] :].tolist()
    assert remote.prefills == ()


@pytest.mark.parametrize("beyond", [0, 3])
def test_a_cache_that_leaves_no_token_is_refused(torch, tokenizer, remote, beyond):
    from transformers import DynamicCache

    cache = DynamicCache()
    messages = [{"role": "user", "content": words(100, 1)}]
    answered(remote, tokenizer, messages, cache)
    cached = cache.get_seq_length()
    ids = torch.ones((1, cached - beyond), dtype=torch.long)
    with pytest.raises(ValueError, match=f"the cache {cached}; it must leave at least one"):
        remote.generate(ids, past_key_values=cache)


def test_a_cache_of_another_kind_is_refused(torch, tokenizer, model, remote):
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="is a StaticCache; RemotePrefill fills a Dynamic"):
        remote.generate(torch.ones((1, 5), dtype=torch.long), past_key_values=cache)


def test_an_error_leaves_a_given_cache_as_it_was(torch, tokenizer, remote):
    from pbs_client import InvalidArgumentError
    from transformers import DynamicCache

    cache = DynamicCache()
    messages = [{"role": "user", "content": words(100, 1)}]
    answered(remote, tokenizer, messages, cache)
    before = cache.layers[0].keys.clone()
    ids = torch.full((1, 200), 320)
    with pytest.raises(InvalidArgumentError):
        remote.generate(ids, past_key_values=cache)
    assert torch.equal(cache.layers[0].keys, before)


# ---- scores


def own_scores(torch, model, prompt, continuation):
    """Log-probabilities of a continuation's tokens, by one forward of transformers."""
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, ids[0, len(prompt) :, None])[:, 0], logits.argmax(-1)


def test_scores_of_continuations_are_transformers_own(torch, model, remote):
    random = np.random.default_rng(5)
    prompts = [random.integers(2, 319, n).tolist() for n in (90, 2, 1, 40)]
    pairs = [
        (prompt, random.integers(2, 319, n).tolist())
        for n in (1, 4, 20)
        for prompt in prompts
    ]
    _, likeliest = own_scores(torch, model, prompts[0], [7])
    pairs.append((prompts[0], likeliest.tolist()))
    scores = remote.score(pairs)
    assert len(remote.prefills) == 3  # of 4 prompts, one has nothing to prefill
    for (prompt, continuation), score in zip(pairs, scores):
        own, best = own_scores(torch, model, prompt, continuation)
        torch.testing.assert_close(
            torch.tensor(score.log_probabilities), own, atol=1e-4, rtol=1e-4
        )
        assert score.log_likelihood == pytest.approx(float(own.sum()), abs=1e-3)
        assert score.is_greedy == (best.tolist() == continuation)
    assert scores[-1].is_greedy


@pytest.mark.parametrize(
    ("pairs", "named"),
    [([([1], [2]), ([], [3])], "prompt 1"), ([([1], [])], "continuation 0")],
)
def test_an_empty_prompt_or_continuation_is_refused(remote, pairs, named):
    with pytest.raises(ValueError, match=f"{named} is empty"):
        remote.score(pairs)
    assert remote.prefills == ()


def test_no_pairs_have_no_scores(remote):
    assert remote.score([]) == []
