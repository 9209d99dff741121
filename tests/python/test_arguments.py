"""What callers pass: time-outs, methods by name, tensors of torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pbs_client import (
    Attention,
    Client,
    Dense,
    Given,
    Inline,
    KvFormat,
    KvPart,
    KvTicket,
    Lease,
    Logits,
    MeanPooling,
    Packed,
    Pbs,
    Synthetic,
)
from pbs_client.options import attention_of, method_of
from pbs_client.prefill_options import delivery_of

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
            Synthetic(num_heads=1, num_kv_heads=1, seq_len=4, head_dim=32),
            timeout=timeout,
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            call(timeout=timeout)


@pytest.mark.parametrize("name", ["dense", "pbs", "mean_pooling"])
def test_a_method_may_be_given_by_its_name(client, name):
    method = {"dense": Dense(), "pbs": Pbs(), "mean_pooling": MeanPooling()}[name]
    assert method_of(name) == method
    tensors = Synthetic(num_heads=2, num_kv_heads=1, seq_len=700, head_dim=32)
    by_name = client.attend_synthetic(tensors, name, want=("o", "lists"))
    assert by_name.stats.method_run == name
    np.testing.assert_array_equal(
        by_name.o, client.attend_synthetic(tensors, method).o
    )
    assert client.prefill("recall", PROMPT, name).first_token >= 0


@pytest.mark.parametrize("method", ["Dense", "sparse", "", Dense, 1, {"pbs": {}}])
def test_another_method_is_refused_with_a_sentence(client, method):
    with pytest.raises(ValueError, match="is not one of 'dense', 'pbs', 'mean_pooling'"):
        client.prefill("recall", PROMPT, method)


def test_a_method_alone_is_an_attention_without_further_options(client):
    assert attention_of("pbs").to_message() == Attention(Pbs()).to_message()
    assert attention_of(None) == Attention()
    own = Attention(coverage_rows=4, dense_fallback=False)  # the server's own method
    q = np.random.default_rng(1).standard_normal((1, 1, 700, 32), np.float32)
    stats = client.attend(q, q, q, own).stats
    assert stats.method_run == "pbs"
    assert stats.coverage_rows == 4
    assert client.prefill("recall", PROMPT, own).stats.coverage > 0


@pytest.mark.parametrize(
    ("name", "delivery"), [("none", None), ("inline", Inline()), ("lease", Lease())], ids=str
)
def test_a_delivery_may_be_given_by_its_name(name, delivery):
    assert delivery_of(name) == delivery
    assert delivery_of(delivery) is delivery
    assert delivery_of(None) is None


BAD_VALUES = {
    "a method that is none": (lambda: Attention("sparse"), "method 'sparse' is not"),
    "an attention in an attention": (lambda: Attention(Attention()), "is not one of 'dense'"),
    "cu_seqlens of floats": (lambda: Packed([0.5]), "cu_seqlens is not a list of integers"),
    "cu_seqlens_k of floats": (lambda: Packed([0], [0.5]), "cu_seqlens_k is not a list"),
    "cu_seqlens of two dimensions": (lambda: Packed([[0, 1]]), "cu_seqlens is not a list"),
    "cu_seqlens without entries": (lambda: Packed([]), "has 0 entries, fewer than 1"),
    "cu_seqlens of two lengths": (
        lambda: Packed([0, 1], [0, 1, 2]), "cu_seqlens_k has 3 entries, cu_seqlens 2"
    ),
    "lists and a mask": (
        lambda: Given(lists=object(), block_mask=[[1]]), "lists or a block_mask, not both"
    ),
    "synthetic fp8": (lambda: Synthetic(1, 1, 4, 32, dtype="fp8"), "dtype 'fp8' is not one"),
    "inline fp8": (lambda: Inline("fp8"), "dtype 'fp8' is not one of f32, f16, bf16"),
    "fetched fp8": (lambda: KvFormat("fp8"), "dtype 'fp8' is not one of f32, f16, bf16"),
    "another layout": (lambda: KvFormat(layout="DHN"), "'DHN' is not one of HND, NHD"),
    "logits at a fraction": (lambda: Logits(positions=[1.5]), "positions is not a list"),
    "logits at one number": (lambda: Logits(positions=7), "positions is not a list"),
}


@pytest.mark.parametrize(("make", "sentence"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_value_that_cannot_be_sent_is_refused_when_it_is_made(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("part", [(1,), (1, 2, 3), 1, "12", (0.5, 1)], ids=str)
def test_a_range_that_is_no_begin_and_count_is_refused_when_it_is_made(part):
    with pytest.raises(TypeError, match=r"tokens .* is not \(begin, count\)"):
        KvPart(tokens=part)


TICKET = KvTicket("0" * 32, 1)
BAD_ARGUMENTS = {
    "packed": (lambda c, q: c.attend(q, q, q, packed=[0, 4]), r"packed \[0, 4\] is not Packed"),
    "given": (lambda c, q: c.attend(q, q, q, given={}), r"given {} is not Given"),
    "timing": (lambda c, q: c.attend(q, q, q, timing=3), r"timing 3 is not Timing"),
    "tensors": (lambda c, _: c.attend_synthetic(None), r"tensors None is not Synthetic"),
    "logits": (lambda c, _: c.prefill("m", [1], logits=5), r"logits 5 is not Logits"),
    "part": (lambda c, _: c.fetch(TICKET, part=(0, 1)), r"part \(0, 1\) is not KvPart"),
    "kv_format": (lambda c, _: c.fetch(TICKET, kv_format="f32"), r"'f32' is not KvFormat"),
}


@pytest.mark.parametrize(("call", "sentence"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_an_argument_of_another_kind_is_refused_before_any_traffic(call, sentence):
    q = np.ones((1, 1, 4, 32), np.float32)
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match=sentence):
        call(client, q)


def test_values_are_equal_when_what_they_send_is():
    assert Packed(np.array([0, 4])) == Packed([0, 4])
    assert Logits(positions=np.array([3])) == Logits(positions=(3,))


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
    given = Given(
        order=torch.from_numpy(own.order), block_mask=torch.from_numpy(own.block_mask)
    )
    again = client.attend(q, q, q, "pbs", given=given)
    np.testing.assert_array_equal(again.o, own.o)


@pytest.mark.peers
def test_a_tensor_that_makes_no_array_is_refused_with_a_sentence(client):
    torch = pytest.importorskip("torch")
    sparse = torch.ones(1, 1, 32, 32).to_sparse()
    with pytest.raises(ValueError, match="give a NumPy array or a dense torch tensor"):
        client.attend(sparse, sparse, sparse)
    with pytest.raises(ValueError, match="tokens have 2 dimensions, not 1"):
        client.prefill("recall", torch.tensor([PROMPT]))
