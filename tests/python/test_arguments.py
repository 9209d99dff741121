"""What callers pass: time-outs, methods by name, tensors of torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pbs_client import Dense, MeanPooling, Pbs
from pbs_client.options import method_of

PROMPT = list(range(40, 90))

TIMEOUTS = {
    "seconds": 30,
    "none": None,
    "infinite": math.inf,
    "beyond any date": 1e300,
    "numpy float": np.float32(30),
    "numpy integer": np.int64(30),
    "array of one": np.array(30.0),
}


@pytest.mark.parametrize("timeout", TIMEOUTS.values(), ids=TIMEOUTS)
def test_every_call_takes_a_timeout_that_is_a_number_or_none(client, timeout):
    assert client.health(timeout=timeout) == "SERVING"
    client.wait_until_serving(timeout=timeout)
    result = client.prefill("recall", PROMPT, delivery="lease", timeout=timeout)
    assert client.fetch(result.ticket, timeout=timeout).prompt_tokens == len(PROMPT)
    client.renew(result.ticket, timeout=timeout)
    client.release(result.ticket, timeout=timeout)
    inline = client.prefill("recall", PROMPT, delivery="inline", timeout=timeout)
    assert inline.first_token == result.first_token
    q = np.ones((1, 1, 4, 32), np.float32)
    assert client.attend(q, q, q, timeout=timeout).o.shape == q.shape


BAD_TIMEOUTS = {
    "text": "30",
    "negative": -1,
    "negative infinity": -math.inf,
    "not a number": math.nan,
    "truth": True,
    "a list": [30],
}


@pytest.mark.parametrize("timeout", BAD_TIMEOUTS.values(), ids=BAD_TIMEOUTS)
def test_another_timeout_is_refused_with_a_sentence(client, timeout):
    sentence = "is not a number of seconds of at least 0; None means no limit"
    for call in (
        client.info,
        lambda timeout: client.prefill("recall", PROMPT, timeout=timeout),
        lambda timeout: client.attend_synthetic(
            num_heads=1, num_kv_heads=1, seq_len=4, head_dim=32, timeout=timeout
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            call(timeout=timeout)


@pytest.mark.parametrize("name", ["dense", "pbs", "mean_pooling"])
def test_a_method_may_be_given_by_its_name(client, name):
    method = {"dense": Dense(), "pbs": Pbs(), "mean_pooling": MeanPooling()}[name]
    assert method_of(name) == method
    shape = dict(num_heads=2, num_kv_heads=1, seq_len=700, head_dim=32)
    by_name = client.attend_synthetic(name, want=("o", "lists"), **shape)
    assert by_name.stats.method_run == name
    np.testing.assert_array_equal(
        by_name.o, client.attend_synthetic(method, **shape).o
    )
    assert client.prefill("recall", PROMPT, name).first_token >= 0


@pytest.mark.parametrize("method", ["Dense", "xattention", "", Dense, 1, {"pbs": {}}])
def test_another_method_is_refused_with_a_sentence(client, method):
    with pytest.raises(ValueError, match="is not one of 'dense', 'pbs', 'mean_pooling'"):
        client.prefill("recall", PROMPT, method)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors_are_taken_as_arrays_are(client, dtype):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(3, 1, 2, 300, 64, generator=generator).to(getattr(torch, dtype))
    q, k, v = made[0].requires_grad_(), made[1], made[2].transpose(1, 2).contiguous()
    result = client.attend(q, k, v.transpose(1, 2), "dense")
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.detach().float(), k.float(), v.transpose(1, 2).float(), is_causal=True
    )
    assert result.o.dtype.name == dtype
    error = np.abs(result.o.astype(np.float32) - expected.numpy()).max()
    assert error <= {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3.2e-2}[dtype]


@pytest.mark.peers
def test_torch_tensors_may_be_tokens_orders_and_masks(client):
    torch = pytest.importorskip("torch")
    ids = torch.tensor(PROMPT)
    assert (
        client.prefill("recall", ids).first_token
        == client.prefill("recall", PROMPT).first_token
    )
    q = np.random.default_rng(1).standard_normal((1, 1, 600, 32), np.float32)
    own = client.attend(q, q, q, "pbs", want=("o", "order", "block_mask"))
    given = client.attend(
        q, q, q, "pbs",
        order=torch.from_numpy(own.order), block_mask=torch.from_numpy(own.block_mask),
    )
    np.testing.assert_array_equal(given.o, own.o)


@pytest.mark.peers
def test_a_tensor_that_makes_no_array_is_refused_with_a_sentence(client):
    torch = pytest.importorskip("torch")
    sparse = torch.ones(1, 1, 32, 32).to_sparse()
    with pytest.raises(ValueError, match="give a NumPy array or a dense torch tensor"):
        client.attend(sparse, sparse, sparse)
    with pytest.raises(ValueError, match="tokens have 2 dimensions, not 1"):
        client.prefill("recall", torch.tensor([PROMPT]))
