"""`pbs-client prefill --push` and `pbs-client sink`, as users run them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from pbs_client import Client, safetensors_file
from pbs_client.cli import main
from push_world import MODEL, bytes_of, prompt

SECONDS_MAX = 60  # only a failure takes so long


@pytest.fixture
def tokens_file(tmp_path):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(prompt(300).tolist()))
    return path


def prefill(pushing, tokens_file, *words: str) -> list[str]:
    common = ["prefill", "--server", pushing.target, "--model", MODEL, "--method", "dense"]
    return [*common, "--tokens", str(tokens_file), *words]


def test_a_sink_writes_what_a_prefill_pushes(
    pushing, target, tokens_file, tmp_path, capsys
):
    folder = tmp_path / "caches"
    folder.mkdir()
    command = [sys.executable, "-m", "pbs_client", "sink", "--listen", target]
    with subprocess.Popen(
        [*command, "--output", str(folder)], stdout=subprocess.PIPE, text=True
    ) as sink:
        assert sink.stdout is not None
        assert json.loads(sink.stdout.readline()) == {"listens": target}
        assert main(prefill(pushing, tokens_file, "--push", target)) == 0
        done = json.loads(capsys.readouterr().out)
        line = json.loads(sink.stdout.readline())
        sink.send_signal(signal.SIGINT)
        assert sink.wait(SECONDS_MAX) == 0
    assert done["ticket"] is None
    assert (line["model"], line["num_tokens"], line["dtype"]) == (MODEL, 300, "f32")
    assert line["model_digest"] == done["model_digest"]
    assert line["output"] == str(folder / f"{line['transfer_id']}.safetensors")
    with Client(pushing.target) as client:
        kv = client.prefill(MODEL, prompt(300), "dense", delivery="inline").kv
    tensors = safetensors_file.read(line["output"])
    layers = range(line["num_layers"])
    names = [*(f"layers.{i}.k" for i in layers), *(f"layers.{i}.v" for i in layers)]
    assert [tensors[name].tobytes() for name in names] == bytes_of(kv)


def test_a_push_that_fails_is_a_line_of_the_sink(
    pushing, target, tokens_file, tmp_path, capsys
):
    command = [sys.executable, "-m", "pbs_client", "sink", "--listen", target]
    limit = ["--output", str(tmp_path), "--bytes-max", "1000"]
    with subprocess.Popen(
        [*command, *limit], stdout=subprocess.PIPE, text=True
    ) as sink:
        assert sink.stdout is not None
        sink.stdout.readline()
        while True:  # a target that refused a connection is tried again later
            status = main(prefill(pushing, tokens_file, "--push", target))
            if status != 4:
                break
        said = capsys.readouterr().err
        line = json.loads(sink.stdout.readline())
        sink.send_signal(signal.SIGINT)
        assert sink.wait(SECONDS_MAX) == 0
    assert status == 3 and f"push to {target}: RESOURCE_EXHAUSTED: bytes" in said
    assert "exceed bytes_max 1000" in line["error"]
    assert line["transfer_id"]


@pytest.mark.parametrize("other", ["--lease", "--kv=x.safetensors"])
def test_a_push_beside_another_delivery_is_wrong_usage(pushing, tokens_file, other, capsys):
    assert main(prefill(pushing, tokens_file, "--push", "127.0.0.1:1", other)) == 2
    assert "not with --lease or --kv" in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    output = tmp_path / "nowhere"
    assert main(["sink", "--listen", "127.0.0.1:0", "--output", str(output)]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_sink_that_cannot_listen_is_refused(tmp_path, capsys):
    listen = ["--listen", "203.0.113.7:50070"]
    assert main(["sink", *listen, "--output", str(tmp_path)]) == 2
    assert "cannot listen at 203.0.113.7:50070" in capsys.readouterr().err
