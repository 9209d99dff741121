"""pbs-client: arguments, files, output lines and exit codes. No server answers here."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types

import grpc
import ml_dtypes
import numpy as np
import pbs_client
import pytest
from fake_server import fake_server, replies
from kv_chunks import EPOCH, Cache
from pbs_client import _messages, safetensors_file
from pbs_client.cli import main, progress
from pbs_client.cli.arguments import make_parser
from pbs_client.cli.commands import _cast
from pbs_client.kv import KvCache, Span

PrefillEvent = _messages._message_class("pbs.v1.PrefillEvent")
MODELS = "/pbs.v1.Prefill/ListModels"
PREFILL = "/pbs.v1.Prefill/Prefill"
NOBODY = "127.0.0.1:1"


def parse(*words: str):
    return make_parser().parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "info --server nowhere",
        "info --timeout 0",
        "info --timeout nan",
        "attend",
        "attend --input x --method sparse",
        "attend --input x --want o,p",
        "attend --input x --dtype f64",
        "prefill",
        "generate --tokens x --model-path y",
        "serve",
        "sink",
        "sink --listen 127.0.0.1:0",
        "sink --listen 127.0.0.1:0 --output x --server 127.0.0.1:1",
    ],
)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert "usage: pbs-client" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["info", "models", "attend", "prefill", "generate", "calibrate"]
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "--server HOST:PORT" in capsys.readouterr().out


def tensors(path, **changes):
    array = np.ones((1, 2, 4, 32), np.float16)
    given = {"q": array, "k": array[:, :1], "v": array[:, :1], **changes}
    safetensors_file.write(path, {n: a for n, a in given.items() if a is not None})
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        pytest.param({"k": None}, "", "has no tensor k", id="no k"),
        pytest.param({}, "--use-order --method pbs", "no tensor order", id="no order"),
        pytest.param(
            {}, "--use-block-mask --method pbs", "no tensor block_mask", id="no mask"
        ),
        pytest.param(
            {"q": np.ones((1, 2, 4, 32))}, "", "q has dtype float64", id="f64"
        ),
        pytest.param(
            {"cu_seqlens_k": np.zeros(2, np.int64)}, "", "no tensor cu_seqlens", id="ends"
        ),
        pytest.param({}, "--threshold 0.5", "--threshold needs --method", id="method"),
        pytest.param(
            {"q": np.ones((1, 2, 4, 32), np.float32)}, "", "dtypes", id="mixed dtypes"
        ),
    ],
)
def test_a_file_that_does_not_fit_exits_with_2(
    tmp_path, capsys, changes, words, message
):
    path = tensors(tmp_path / "in.safetensors", **changes)
    assert main(["attend", "--server", NOBODY, "--input", path, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "No such file", id="no file"),
        pytest.param(b"[1, 2", "is not JSON", id="cut"),
        pytest.param(b'{"a": 1}', "not a JSON list of integers", id="an object"),
        pytest.param(b"[1, 2.5]", "not a JSON list of integers", id="a float"),
        pytest.param(b"[1, true]", "not a JSON list of integers", id="a boolean"),
        pytest.param(b"[-1]", "token -1 at position 0", id="a negative token"),
    ],
)
def test_a_tokens_file_that_is_none_exits_with_2(tmp_path, capsys, content, message):
    path = tmp_path / "tokens.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["prefill", "--server", NOBODY, "--tokens", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "attend --input x --output",
        "prefill --tokens TOKENS --kv",
        "capture --tokens TOKENS --layers 0 --output",
        "calibrate --prompts x --budget 0.1 --output",
    ],
)
@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("none", "folder {} does not exist"),
        ("tokens.json", "{} is not a folder"),
    ],
)
def test_an_output_that_cannot_be_made_is_refused_before_any_work(
    tmp_path, capsys, words, folder, message
):
    tokens = tmp_path / "tokens.json"
    tokens.write_text("[1, 2]")
    path = tmp_path / folder / "out.file"
    command = words.replace("TOKENS", str(tokens)).split()
    assert main([*command, str(path), "--server", NOBODY]) == 2
    reason = message.format(path.parent)
    assert capsys.readouterr().err == f"pbs-client: cannot write {path}: {reason}\n"


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("info", 30),
        ("models", 30),
        ("models --timeout 5", 5),
        ("attend --input x", 3600),
        ("prefill --tokens x", 3600),
    ],
)
def test_commands_that_only_ask_wait_less_than_those_that_work(words, seconds):
    assert parse(*words.split()).timeout == seconds


def aborting(code: grpc.StatusCode):
    def handle(requests, context):
        context.abort(code, "it said\nwhy")
        yield b""

    return handle


@pytest.mark.parametrize(
    ("code", "exit_code", "next_step"),
    [
        ("INVALID_ARGUMENT", 3, "change the request"),
        ("NOT_FOUND", 3, "lists the models"),
        ("RESOURCE_EXHAUSTED", 3, "try again later"),
        ("UNIMPLEMENTED", 3, "pbs-client info"),
        ("INTERNAL", 3, "its log has details"),
        ("FAILED_PRECONDITION", 3, "the model that the cache was made with"),
        ("UNAVAILABLE", 4, "check that pbs-prefilld runs at 127.0.0.1:"),
        ("DEADLINE_EXCEEDED", 4, "--timeout"),
        ("DATA_LOSS", 5, "run it again"),
    ],
)
def test_a_failed_call_is_one_line_that_says_what_to_do(
    code, exit_code, next_step, capsys
):
    with fake_server({MODELS: aborting(grpc.StatusCode[code])}) as target:
        assert main(["models", "--server", target]) == exit_code
    error = capsys.readouterr().err
    assert error.startswith(f"pbs-client: {code}: it said why; ")
    assert next_step in error
    assert error.count("\n") == 1


def test_a_server_that_is_not_there_exits_with_4(capsys):
    with fake_server({}) as target:
        pass
    assert main(["info", "--server", target]) == 4
    assert target in capsys.readouterr().err


def test_models_prints_a_line_of_json_each(capsys):
    reply = _messages.ListModelsResponse(
        models=[{"name": "a", "kv_dtype": "BF16"}, {"name": "b", "eos_token_ids": [2]}]
    )
    with fake_server({MODELS: replies(reply)}) as target:
        assert main(["models", "--server", target]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(m["name"], m["kv_dtype"], m["eos_token_ids"]) for m in lines] == [
        ("a", "bf16", []),
        ("b", "unknown", [2]),
    ]


def test_a_density_that_is_not_a_number_is_null(tmp_path, capsys):
    path = tmp_path / "tokens.json"
    path.write_text("[1]")
    done = PrefillEvent(done={"stats": {"density": float("nan")}})
    with fake_server({PREFILL: replies(done)}) as target:
        assert main(["prefill", "--server", target, "--tokens", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["density"] is None


@pytest.fixture
def hf_without_torch(monkeypatch):
    """pbs_client.hf, but loading and decoding are somebody else's."""
    stub = types.SimpleNamespace(
        load_model=lambda *_, **__: None,
        check_same_model=lambda *_: None,
        generate=lambda *_, first_token, **__: [first_token],
    )
    monkeypatch.setattr(pbs_client, "hf", stub, raising=False)
    monkeypatch.setitem(sys.modules, "pbs_client.hf", stub)


def generate(tmp_path, **handlers) -> int:
    """The exit code of `generate` where a prefill leaves a lease."""
    path = tmp_path / "tokens.json"
    path.write_text("[1, 2, 3]")
    ticket = {"handle": "0" * 32, "epoch": EPOCH}
    descriptor = _messages.KvDescriptor(
        lease={"ticket": ticket, "ttl_seconds": 60},
        num_layers=1,
        num_kv_heads=1,
        head_dim=4,
        num_tokens=3,
        dtype="F32",
        bytes=2 * 3 * 4 * 4,
        state="COMPLETE",
    )
    models = _messages.ListModelsResponse(models=[{"name": "m"}])
    done = PrefillEvent(done={"ticket": ticket, "first_token_id": 7})
    answers = {
        "Describe": replies(descriptor),
        "Fetch": replies(*Cache.random(1, 1, 3, 4).chunks()),
        "Renew": replies(_messages.KvLease()),
        **handlers,
    }
    served = {f"/pbs.v1.KvSource/{name}": answer for name, answer in answers.items()}
    served.update({MODELS: replies(models), PREFILL: replies(done)})
    words = ["--tokens", str(path), "--model-path", "x", "--max-new-tokens", "1"]
    with fake_server(served) as target:
        return main(["generate", "--server", target, *words])


@pytest.mark.parametrize("code", ["UNAVAILABLE", "NOT_FOUND"])
def test_a_release_that_fails_does_not_cost_the_answer(
    hf_without_torch, tmp_path, capsys, code
):
    assert generate(tmp_path, Release=aborting(grpc.StatusCode[code])) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == [7]


def test_a_release_that_fails_does_not_hide_why_the_fetch_did(
    hf_without_torch, tmp_path, capsys
):
    faults = {
        "Fetch": aborting(grpc.StatusCode.DATA_LOSS),
        "Release": aborting(grpc.StatusCode.UNAVAILABLE),
    }
    assert generate(tmp_path, **faults) == 5
    assert capsys.readouterr().err.startswith("pbs-client: DATA_LOSS: it said why")


def test_the_module_runs_like_the_script():
    run = subprocess.run(
        [sys.executable, "-m", "pbs_client", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("pbs-client ")


BF16_TIES = [
    ("halfway rounds to even below", 1.0 + 2**-8, 1.0),
    ("halfway rounds to even above", 1.0 + 3 * 2**-8, 1.0 + 2**-6),
    ("just above halfway rounds up", 1.0 + 2**-8 + 2**-20, 1.0 + 2**-7),
    ("just below halfway rounds down", 1.0 + 2**-8 - 2**-20, 1.0),
]


@pytest.mark.parametrize(
    ("value", "rounded"), [pytest.param(*case[1:], id=case[0]) for case in BF16_TIES]
)
def test_a_cast_to_bf16_rounds_to_nearest_even(value, rounded):
    cast = _cast("q", np.array([value], np.float32), "bf16")
    assert cast.dtype == ml_dtypes.bfloat16
    assert float(cast[0]) == rounded


def test_a_cast_from_f16_to_f32_is_exact():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    cast = _cast("q", values, "f32")
    np.testing.assert_array_equal(cast.astype(np.float64), values.astype(np.float64))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_draws_on_a_terminal_and_wipes_its_line():
    stream = Terminal()
    with progress.ProgressBar(stream) as bar:
        bar.update("prefill", 1, 2, " layers")
        bar.update("prefill", 2, 2, " layers")
    drawn = stream.getvalue()
    assert "1/2 layers" in drawn
    assert "[" + "#" * 30 + "] 2/2 layers" in drawn
    assert drawn.endswith("\r\x1b[K")


def test_the_bar_is_silent_anywhere_else():
    stream = io.StringIO()
    with progress.ProgressBar(stream) as bar:
        bar.update("prefill", 1, 2)
        bar.update_bytes("upload", 0, 0)
    assert stream.getvalue() == ""


def test_a_cache_is_named_by_layer():
    cache = Cache.random(2, 1, 3, 4)
    kv = KvCache(
        k=tuple(a["K"] for a in cache.arrays),
        v=tuple(a["V"] for a in cache.arrays),
        layers=Span(4, 2),
        tokens=Span(0, 3),
        heads=Span(0, 1),
        prompt_tokens=3,
    )
    assert list(kv.tensors()) == [
        "layers.4.k",
        "layers.4.v",
        "layers.5.k",
        "layers.5.v",
    ]
