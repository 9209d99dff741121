"""Methods and options: their classes, their messages, their flags. No server here."""

from __future__ import annotations

import dataclasses

import pytest
from google.protobuf import text_format
from pbs_client import (
    Attention,
    Dense,
    FlashPrefill,
    FlexPrefill,
    MeanPooling,
    MInference,
    Pbs,
    Permute,
    Prism,
    XAttention,
    _messages,
    results,
)
from pbs_client.cli import main
from pbs_client.cli.arguments import make_parser
from pbs_client.cli.attention import attention_from
from pbs_client.options import METHODS, method_of

# Every field of every class, with a value that is not its default.
FULL = {
    "dense": Dense(64),
    "pbs": Pbs(64, 512, 0.7, "query_head", False),
    "mean_pooling": MeanPooling(64, 0.7, False),
    "xattention": XAttention(64, 16, 0.7, False),
    "minference": MInference(64, 500, 3000),
    "flexprefill": FlexPrefill(64, 0.7, 0.2, False),
    "prism": Prism(64, 0.7, 0.6, 48, 32, False),
    "flashprefill": FlashPrefill(64, 0.2),
}
SHARED = Attention(
    dense_fallback=False,
    coverage_rows=8,
    dense_tail_blocks=1,
    sink_blocks=2,
    window_blocks=3,
    mean_correction=True,
    as_published=True,
    permute=Permute(512, "query_head"),
)


# Fields of Attention that are fields of PrefillRequest.
OF_PREFILL = {"profile", "head_thresholds", "threshold_min"}


def fields(value) -> dict:
    """The fields of a dataclass and their values, not those of values inside."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def test_there_is_a_class_of_every_method_of_the_protocol():
    numbers = _messages.enum_numbers("Method")
    names = [name.lower() for name in numbers if name != "METHOD_UNSPECIFIED"]
    assert list(METHODS) == names == list(FULL)
    assert [results.method_name(n) for n in numbers.values()][1:] == names


@pytest.mark.parametrize("name", FULL)
def test_a_class_has_the_fields_of_its_message(name):
    wire = _messages.AttentionOptions.DESCRIPTOR.fields_by_name[name].message_type
    given = {"use_given_order", "use_given_lists"}  # Given has them
    assert set(fields(FULL[name])) == set(wire.fields_by_name) - given
    assert None not in fields(FULL[name]).values()


def test_attention_has_the_fields_of_its_message():
    wire = set(_messages.AttentionOptions.DESCRIPTOR.fields_by_name)
    own = set(fields(SHARED)) - {"method", "permute"} - OF_PREFILL
    assert own == wire - set(METHODS) - {"permutation"}
    permutation = _messages.AttentionOptions.DESCRIPTOR.fields_by_name["permutation"]
    assert set(fields(SHARED.permute)) == set(
        permutation.message_type.fields_by_name
    ) - {"use_given_order"}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("shared", [Attention(), SHARED], ids=["alone", "with all"])
def test_every_field_survives_the_way_through_a_message(name, shared):
    for method in (FULL[name], METHODS[name]()):
        sent = dataclasses.replace(shared, method=method)
        data = sent.to_message().SerializeToString()
        received = _messages.AttentionOptions.FromString(data)
        assert received.WhichOneof("method") == name
        assert Attention.from_message(received) == sent


def test_a_message_without_a_known_method_or_scope_is_read_as_none():
    assert Attention.from_message(_messages.AttentionOptions()) == Attention()
    message = _messages.AttentionOptions(pbs={"scope": 7, "block_size": 64})
    assert Attention.from_message(message) == Attention(Pbs(64))


def test_permute_may_be_a_truth():
    assert Attention("prism", permute=True).to_message().HasField("permutation")
    assert not Attention("prism", permute=False).to_message().HasField("permutation")
    with pytest.raises(ValueError, match="permute 'yes' is not Permute"):
        Attention("prism", permute="yes")
    with pytest.raises(ValueError, match="scope 'head' is not one of kv_head, query_head"):
        Permute(scope="head")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name):
    method = method_of(name)
    assert (method, method.name) == (METHODS[name](), name)
    assert method.selects == (name != "dense")
    assert method.permutes == (name == "pbs")


# ---- the console script

FLAGS = [
    # flags; the message in text format
    ("", ""),
    ("--method dense", "dense {}"),
    ("--method dense --block-size 64", "dense { block_size: 64 }"),
    ("--method pbs", "pbs {}"),
    (
        "--method pbs --block-size 64 --segment-size 512 --threshold 0.7 "
        "--scope query_head --no-force-first-block",
        "pbs { block_size: 64 segment_size: 512 threshold: 0.7 scope: QUERY_HEAD "
        "force_first_block: false }",
    ),
    ("--method mean_pooling --threshold 0.5", "mean_pooling { threshold: 0.5 }"),
    (
        "--method xattention --stride 8 --threshold .9 --force-first-block",
        "xattention { stride: 8 threshold: 0.9 force_first_block: true }",
    ),
    (
        "--method minference --vertical-tokens 1000 --slash-tokens 6096",
        "minference { vertical_tokens: 1000 slash_tokens: 6096 }",
    ),
    (
        "--method flexprefill --gamma .95 --tau .1",
        "flexprefill { gamma: 0.95 tau: 0.1 }",
    ),
    (
        "--method prism --threshold .95 --fast-threshold .9 --slow-dims 96 "
        "--fast-dims 64",
        "prism { threshold: 0.95 fast_threshold: 0.9 slow_dims: 96 fast_dims: 64 }",
    ),
    ("--method flashprefill --alpha .1", "flashprefill { alpha: 0.1 }"),
    (
        "--method flashprefill --dense-tail-blocks 1 --sink-blocks 2 --window-blocks 3 "
        "--mean-correction --as-published --no-dense-fallback --coverage-rows 4",
        "flashprefill {} dense_tail_blocks: 1 sink_blocks: 2 window_blocks: 3 "
        "mean_correction: true as_published: true dense_fallback: false "
        "coverage_rows: 4",
    ),
    ("--method xattention --permute", "xattention {} permutation {}"),
    (
        "--method xattention --permute --segment-size 512 --scope kv_head",
        "xattention {} permutation { segment_size: 512 scope: KV_HEAD }",
    ),
    # the server's default profile, changed
    (
        "--dense-tail-blocks 1 --sink-blocks 0 --window-blocks 3 --no-mean-correction",
        "dense_tail_blocks: 1 sink_blocks: 0 window_blocks: 3 mean_correction: false",
    ),
    ("--permute --segment-size 512", "permutation { segment_size: 512 }"),
    ("--dense-fallback --coverage-rows 8", "dense_fallback: true coverage_rows: 8"),
]
COMMANDS = {
    "attend": "attend --input x",
    "prefill": "prefill --tokens x",
    "generate": "generate --tokens x --model-path y --max-new-tokens 1",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("flags", "text"), FLAGS, ids=[case[0] for case in FLAGS])
def test_flags_become_a_message(command, flags, text):
    parsed = make_parser().parse_args(f"{COMMANDS[command]} {flags}".split())
    expected = text_format.Parse(text, _messages.AttentionOptions())
    assert attention_from(parsed).to_message() == expected


def test_what_only_a_prefill_has_goes_into_its_request():
    rows = [[0.5, 1.0], [0.25, 0.75]]
    request = _messages.PrefillRequest()
    Attention(Pbs(64), head_thresholds=rows, threshold_min=0.5).fill_prefill(request)
    assert [list(layer.thresholds) for layer in request.layers] == rows
    assert (request.threshold_min, request.profile) == (0.5, "")
    assert request.attention.pbs.block_size == 64
    request = _messages.PrefillRequest()
    Attention(profile="mine", sink_blocks=2).fill_prefill(request)
    assert (request.profile, request.attention.sink_blocks) == ("mine", 2)
    assert not request.HasField("threshold_min")


SELECTING = "pbs, mean_pooling, xattention, minference, flexprefill, prism"
REFUSALS = [
    # flags; what the message says
    (
        "--method pbs --alpha 0.1",
        "--alpha 0.1 is an option of flashprefill; --method pbs does not have it",
    ),
    (
        "--method dense --threshold 0.5",
        "--threshold 0.5 is an option of pbs, mean_pooling, xattention and prism; "
        "--method dense does not have it",
    ),
    (
        "--method minference --no-force-first-block",
        "--no-force-first-block is an option of pbs, mean_pooling, xattention, "
        "flexprefill and prism; --method minference does not have it",
    ),
    (
        "--method mean_pooling --segment-size 512",
        "--segment-size 512 is an option of pbs, and others with --permute; "
        "--method mean_pooling does not have it",
    ),
    (
        "--method pbs --permute",
        "--permute is an option of mean_pooling, xattention, minference, flexprefill, "
        "prism and flashprefill; --method pbs does not have it",
    ),
    (
        "--method dense --permute --segment-size 512",
        "--segment-size 512 is an option of pbs, and others with --permute; "
        "--method dense does not have it",
    ),
    *(
        (
            f"--method dense {flag}",
            f"{flag} is an option of {SELECTING} and flashprefill; "
            "--method dense does not have it",
        )
        for flag in (
            "--dense-tail-blocks 1",
            "--sink-blocks 1",
            "--window-blocks 1",
            "--mean-correction",
            "--no-mean-correction",
            "--as-published",
        )
    ),
    *(
        (
            f"--method {method} --coverage-min 0.5 --coverage-rows 16",
            "--coverage-min 0.5 is an option of pbs, mean_pooling, xattention, "
            f"flexprefill, prism and flashprefill; --method {method} does not have it",
        )
        for method in ("dense", "minference")
    ),
    (
        "--method minference --vertical-tokens 99999999999",
        "--vertical-tokens 99999999999 is outside [-2147483648, 2147483647]",
    ),
    (
        "--method pbs --threshold 1e-50",
        "--threshold 1e-50 would be 0 as a float32, which is at least 1.4e-45",
    ),
    (
        "--method pbs --threshold 1e39",
        "--threshold 1e+39 is beyond a float32, at most 3.4028235e+38",
    ),
    ("--stride 8", "--stride needs --method xattention"),
    (
        "--threshold 0.5",
        "--threshold needs --method pbs, mean_pooling, xattention or prism",
    ),
    ("--scope kv_head", "--scope needs --method pbs, or others with --permute"),
    ("--block-size 64", f"--block-size needs --method dense, {SELECTING} or flashprefill"),
    (
        "--as-published",
        f"--as-published needs --method {SELECTING} or flashprefill",
    ),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("flags", "message"), REFUSALS, ids=[case[0] for case in REFUSALS]
)
def test_an_option_that_the_method_lacks_exits_with_2(command, flags, message, capsys):
    assert main(f"{COMMANDS[command]} {flags}".split()) == 2
    assert capsys.readouterr().err == f"pbs-client: {message}\n"


PROFILE_REFUSALS = {
    # flags; what the message says
    "--profile=": "--profile is empty; `pbs-client models` lists the profiles",
    "--profile paper --method pbs": "--profile and --method exclude each other",
    "--profile paper --as-published": "--profile and --as-published exclude each other",
    "--profile paper --threshold 0.5": "--profile and --threshold exclude each other",
    "--profile paper --scope kv_head": "--profile and --scope exclude each other",
}


@pytest.mark.parametrize("command", ["prefill", "generate"])
@pytest.mark.parametrize(
    ("flags", "message"), PROFILE_REFUSALS.items(), ids=PROFILE_REFUSALS
)
def test_what_a_profile_does_not_go_with_exits_with_2(command, flags, message, capsys):
    assert main(f"{COMMANDS[command]} {flags}".split()) == 2
    assert capsys.readouterr().err == f"pbs-client: {message}\n"


def test_a_profile_may_be_changed_and_sorted():
    flags = "--profile mine --sink-blocks 1 --permute --segment-size 512"
    parsed = make_parser().parse_args(f"prefill --tokens x {flags}".split())
    expected = Attention(profile="mine", sink_blocks=1, permute=Permute(512))
    assert attention_from(parsed) == expected


@pytest.mark.parametrize("name", FULL)
def test_every_option_has_a_flag(name):
    flags = make_parser().parse_args(["attend", "--input", "x"])
    options = {**fields(FULL[name]), **fields(SHARED), **fields(SHARED.permute)}
    for option in set(options) - OF_PREFILL:
        assert hasattr(flags, option)
    flags = make_parser().parse_args(["prefill", "--tokens", "x"])
    for option in OF_PREFILL - {"head_thresholds"}:  # a table has no flag
        assert hasattr(flags, option)


def test_help_lists_the_methods_and_who_has_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["attend", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, kind in METHODS.items():
        assert f" {name} {kind.__doc__.splitlines()[0].rstrip('.')} " in text
    for line in (
        "--method NAME",
        "--block-size TOKENS every method: a power of two",
        "--threshold SHARE pbs, mean_pooling, xattention and prism: attention mass",
        "--scope kv_head|query_head pbs, and others with --permute: one key order",
        "--alpha SHARE flashprefill: keep blocks",
        "--mean-correction, --no-mean-correction",
    ):
        assert line in text
