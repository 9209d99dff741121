"""Values check the types of their fields when they are made, by their annotations."""

from __future__ import annotations

import dataclasses
import decimal
import re

import numpy as np
import pytest
from pbs_client import (
    Attention,
    Client,
    Inline,
    KvFormat,
    KvTicket,
    Lease,
    Logits,
    MInference,
    Packed,
    Pbs,
    Permute,
    Synthetic,
    Timing,
    XAttention,
    _messages,
)
from pbs_client.options import METHODS

INT32 = "[-2147483648, 2147483647]"
VALUES = [
    *(kind() for kind in METHODS.values()),
    Attention(),
    Permute(),
    Timing(),
    Synthetic(1, 1, 4, 32),
    Inline(),
    Lease(),
    Logits(),
    KvFormat(),
]
# Fields that are not checked by their annotation; a test of their own has them.
OTHERS = {"method", "permute", "head_thresholds", "dtype", "positions"}
OTHERS |= {"capture_query_layers"}
FIELDS = [
    (value, field.name)
    for value in VALUES
    for field in dataclasses.fields(value)
    if field.name not in OTHERS
]
IDS = [f"{type(value).__name__}.{name}" for value, name in FIELDS]


@pytest.mark.parametrize(("value", "name"), FIELDS, ids=IDS)
def test_every_field_refuses_another_type_by_its_name(value, name):
    where = re.escape(f"{type(value).__name__}.{name} [1] is not ")
    with pytest.raises(TypeError, match=f"^{where}(an integer|a number|True|a string)"):
        dataclasses.replace(value, **{name: [1]})


WRONG_TYPES = {
    # how it is made; the message
    "an integer of text": (
        lambda: XAttention(stride="8"),
        "XAttention.stride '8' is not an integer",
    ),
    "an integer with a fraction": (
        lambda: XAttention(stride=8.5),
        "XAttention.stride 8.5 is not an integer",
    ),
    "an integer that is no number": (
        lambda: XAttention(stride=float("nan")),
        "XAttention.stride nan is not an integer",
    ),
    "an integer of truth": (
        lambda: XAttention(stride=True),
        "XAttention.stride True is not an integer",
    ),
    "a number of text": (
        lambda: XAttention(threshold=".9"),
        "XAttention.threshold '.9' is not a number",
    ),
    "a number of truth": (
        lambda: XAttention(threshold=True),
        "XAttention.threshold True is not a number",
    ),
    "a complex number": (
        lambda: XAttention(threshold=1j),
        "XAttention.threshold 1j is not a number",
    ),
    "a share of truth": (
        lambda: Attention(coverage_min=True),
        "Attention.coverage_min True is not a number",
    ),
    "a truth of -1": (
        lambda: Attention(mean_correction=-1),
        "Attention.mean_correction -1 is not True or False",
    ),
    "a truth of 2": (
        lambda: Attention(dense_fallback=2),
        "Attention.dense_fallback 2 is not True or False",
    ),
    "a huge truth": (
        lambda: Attention("pbs", as_published=2**40),
        "Attention.as_published 1099511627776 is not True or False",
    ),
    "a name of 5": (lambda: Attention(profile=5), "Attention.profile 5 is not a string"),
    "a scope of 5": (lambda: Pbs(scope=5), "Pbs.scope 5 is not a string"),
    "thresholds in one row": (
        lambda: Attention(head_thresholds=[0.9, 0.9]),
        "Attention.head_thresholds is not a table of numbers, [num_layers][num_heads]",
    ),
    "thresholds of one number": (
        lambda: Attention(head_thresholds=0.9),
        "Attention.head_thresholds is not a table of numbers, [num_layers][num_heads]",
    ),
    "a threshold of text": (
        lambda: Attention(head_thresholds=[[0.9], [0.9, "x"]]),
        "Attention.head_thresholds[1][1] 'x' is not a number",
    ),
}
WRONG_NUMBERS = {
    "an integer of 41 bits": (
        lambda: Attention(dense_tail_blocks=2**40),
        f"Attention.dense_tail_blocks 1099511627776 is outside {INT32}",
    ),
    "one beyond int32": (
        lambda: XAttention(stride=2**31),
        f"XAttention.stride 2147483648 is outside {INT32}",
    ),
    "one below int32": (
        lambda: MInference(slash_tokens=-(2**31) - 1),
        f"MInference.slash_tokens -2147483649 is outside {INT32}",
    ),
    "an integer without end": (
        lambda: XAttention(stride=10**5000),
        f"XAttention.stride of 16610 bits is outside {INT32}",
    ),
    "a seed below 0": (
        lambda: Synthetic(1, 1, 4, 32, seed=-1),
        f"Synthetic.seed -1 is outside [0, {2**64 - 1}]",
    ),
    "a bound beyond int32": (
        lambda: Packed([0, 2**31]),
        f"cu_seqlens[1] 2147483648 is outside {INT32}",
    ),
    "a position below 0": (
        lambda: Logits(positions=[-1]),
        "positions[0] -1 is outside [0, 4294967295]",
    ),
    "a number of 400 digits": (
        lambda: XAttention(threshold=10**400),
        "XAttention.threshold of 1329 bits is beyond a float32, at most 3.4028235e+38",
    ),
    "a number beyond float32": (
        lambda: Pbs(threshold=1e39),
        "Pbs.threshold 1e+39 is beyond a float32, at most 3.4028235e+38",
    ),
    "a number that float32 makes 0": (
        lambda: Pbs(threshold=1e-50),
        "Pbs.threshold 1e-50 would be 0 as a float32, which is at least 1.4e-45",
    ),
    "a threshold of a head that float32 makes 0": (
        lambda: Attention(head_thresholds=[[1e-50]]),
        "Attention.head_thresholds[0][0] 1e-50 would be 0 as a float32, which is at "
        "least 1.4e-45",
    ),
    "an empty name": (
        lambda: Attention(profile=""),
        "Attention.profile is empty; None is no profile",
    ),
    "no thresholds": (
        lambda: Attention(head_thresholds=[]),
        "Attention.head_thresholds is empty; None is the method's threshold",
    ),
    "a profile as published": (
        lambda: Attention(profile="paper", as_published=True),
        "profile 'paper' and as_published exclude each other",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_a_value_of_another_type_is_a_type_error(make, message):
    with pytest.raises(TypeError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(("make", "message"), WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_a_value_that_cannot_be_sent_is_a_value_error(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is below
        make()
    assert str(caught.value) == message


def test_an_integer_of_a_call_is_named_with_its_limits():
    ticket = KvTicket("0" * 32, 1)
    with Client("127.0.0.1:1") as client:
        with pytest.raises(ValueError, match=r"^priority 2147483648 is outside \["):
            client.prefill("m", [1], priority=2**31)
        with pytest.raises(ValueError, match=r"^ttl_seconds 2147483648 is outside \["):
            client.renew(ticket, 2**31)


NUMBERS = {
    # a value; the same of Python's own types
    "integers": (XAttention(stride=np.int64(16)), XAttention(stride=16)),
    "an array of one integer": (XAttention(stride=np.array(16)), XAttention(stride=16)),
    "floats": (XAttention(threshold=np.float64(0.9)), XAttention(threshold=0.9)),
    "a float that is whole": (XAttention(threshold=1), XAttention(threshold=1.0)),
    "a half": (XAttention(threshold=np.float16(0.5)), XAttention(threshold=0.5)),
    "a decimal": (XAttention(threshold=decimal.Decimal("0.5")), XAttention(threshold=0.5)),
    "truths": (Attention(dense_fallback=np.True_), Attention(dense_fallback=True)),
    "a table": (
        Attention(head_thresholds=np.full((2, 4), 0.5)),
        Attention(head_thresholds=[[0.5] * 4] * 2),
    ),
}


@pytest.mark.parametrize(("given", "own"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_numpy_are_numbers(given, own):
    assert given == own
    assert repr(given) == repr(own)


def test_a_table_of_numpy_is_sent():
    request = _messages.PrefillRequest()
    table = np.array([[0.5, 1.0], [0.25, 0.75]], np.float32)
    Attention("pbs", head_thresholds=table).fill_prefill(request)
    assert [list(layer.thresholds) for layer in request.layers] == table.tolist()
