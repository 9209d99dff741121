"""Settings of evaluations are those of the paper, and wrong ones are named."""

from __future__ import annotations

import json

import pytest
from pbs_client import (
    Attention,
    Client,
    Dense,
    FlexPrefill,
    MeanPooling,
    MInference,
    Pbs,
    XAttention,
)

pytestmark = pytest.mark.peers

AS_PUBLISHED = {"dense_fallback": False, "as_published": True}
METHODS = {
    "dense": Attention(Dense()),
    "pbs": Attention(Pbs(block_size=128, segment_size=256, threshold=0.9), **AS_PUBLISHED),
    "mean_pooling": Attention(MeanPooling(block_size=128, threshold=0.9), **AS_PUBLISHED),
    "xattention": Attention(
        XAttention(block_size=128, stride=8, threshold=0.9), **AS_PUBLISHED
    ),
    "flexprefill": Attention(
        FlexPrefill(block_size=128, gamma=0.95, tau=0.1), **AS_PUBLISHED
    ),
    "minference": Attention(
        MInference(vertical_tokens=1000, slash_tokens=6096), **AS_PUBLISHED
    ),
}


@pytest.fixture(scope="module")
def settings():
    from pbs_client.lm_eval import settings

    return settings


def attention_in(found):
    from pbs_client.lm_eval.model import take_attention

    arguments = dict(found["model_args"])
    attention = take_attention(arguments)
    assert arguments == {"dtype": "bfloat16"}
    return attention


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_settings_of_the_paper(settings, name):
    found = settings.load(name)
    assert attention_in(found) == METHODS[name]
    assert found["batch_size"] == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_server_takes_the_settings_of_a_method(settings, server, name):
    attention = attention_in(settings.load(name))
    with Client(server.target) as client:
        result = client.prefill("recall", list(range(300)), attention)
    assert result.stats.prompt_tokens == 300
    is_exact = name in ("dense", "minference")  # whose 6096 diagonals are all of them
    assert (result.sparsity_digest == "exact") == is_exact


def test_every_file_says_what_it_is_and_names_tasks_that_there_are(settings):
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    assert set(METHODS) < set(settings.names())
    for name in settings.names():
        found = settings.load(name)
        assert found["about"], name
        assert set(found.get("tasks", ())) <= known, name


def test_new_tokens_and_lengths_are_those_of_the_paper(settings):
    assert settings.load("longbench")["gen_kwargs"] == {"max_gen_toks": 2048}
    lengths = {
        "llama-3.1-8b-instruct": 131072,
        "qwen2.5-7b-instruct-1m": 1048576,
        "qwen2.5-7b-instruct-1m-longbench2": 409600,
    }
    for name, length in lengths.items():
        assert settings.load(name)["model_args"] == {"max_length": length}


COMMANDS = {
    # what is written; what the harness gets
    "without settings": (["run", "--tasks", "a"], ["run", "--tasks", "a"]),
    "nothing": ([], []),
    "one": (
        ["--settings", "dense", "--tasks", "a"],
        ["run", "--model", "pbs", "--model_args",
         '{"method": "dense", "dtype": "bfloat16"}', "--batch_size", "1", "--tasks", "a"],
    ),
    "tasks instead of those of the settings": (
        ["--settings", "longbench2", "--tasks", "a"],
        ["run", "--model", "pbs", "--tasks", "a"],
    ),
    "several, after a command": (
        ["run", "--limit", "3", "--settings", "dense", "longbench",
         "llama-3.1-8b-instruct"],
        ["run", "--model", "pbs", "--apply_chat_template", "--tasks", "longbench",
         "--model_args",
         '{"method": "dense", "dtype": "bfloat16", "max_length": 131072}',
         "--gen_kwargs", '{"max_gen_toks": 2048}', "--batch_size", "1", "--limit", "3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), COMMANDS.values(), ids=COMMANDS)
def test_settings_become_flags_that_later_ones_override(settings, words, expected):
    assert settings.expanded(words) == expected


WRONG_FILES = {
    # content; what the message says
    "no JSON": ("{", "cannot be read"),
    "a list": ("[]", "is not a JSON object"),
    "an unknown field": ('{"task": []}', "unknown field 'task'; known are about, tasks"),
    "a number as text": ('{"batch_size": "1"}', "field batch_size is not of type int"),
    "true as a number": ('{"batch_size": true}', "field batch_size is not of type int"),
}


@pytest.mark.parametrize(("content", "named"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_refused_by_name(settings, tmp_path, content, named):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(settings.SettingsError, match=f"mine.json.* {named}"):
        settings.expanded(["--settings", str(path)])


@pytest.mark.parametrize("words", [["--settings"], ["--settings", "--tasks", "a"]])
def test_settings_without_a_name_list_the_names(settings, words):
    with pytest.raises(settings.SettingsError, match="needs one or more of: dense, flex"):
        settings.expanded(words)


def test_dicts_of_several_settings_are_merged_and_the_last_value_counts(settings):
    merged = settings.merged(
        [
            {"model_args": {"a": 1, "b": 2}, "batch_size": 1, "tasks": ["x"]},
            {"model_args": {"b": 3}, "batch_size": 4},
        ]
    )
    assert merged == {"model_args": {"a": 1, "b": 3}, "batch_size": 4, "tasks": ["x"]}


MISSING = {
    # an error; the data set, None when it is about none
    "a known one": (
        ConnectionError("Couldn't reach 'Xnhyacinth/LongBench' on the Hub (Offline)"),
        "Xnhyacinth/LongBench",
    ),
    "one of others": (
        ConnectionError("Couldn't reach 'some/set' on the Hub (Offline)"),
        "some/set",
    ),
    "one that is gone": (
        FileNotFoundError("Dataset 'some/set' doesn't exist on the Hub or cannot be read"),
        "some/set",
    ),
    "a plain download": (
        OSError("host='rajpurkar.github.io' url: /SQuAD-explorer/dataset/dev-v2.0.json"),
        "SQuAD 2.0",
    ),
    "another file": (FileNotFoundError("model.safetensors"), None),
    "an error of code": (TypeError("Xnhyacinth/LongBench"), None),
}


@pytest.mark.parametrize(("error", "name"), MISSING.values(), ids=MISSING)
def test_a_missing_data_set_is_told_from_other_errors(error, name):
    from pbs_client.lm_eval import data_sets

    for raised in (error, RuntimeError("a task cannot be loaded")):
        if raised is not error:
            raised.__cause__ = error
        found = data_sets.missing(raised)
        assert (found and found.name) == name
        if found:
            assert found.url in data_sets.advice(found)


def test_data_sets_of_ruler_are_known():
    from pbs_client.lm_eval import data_sets

    urls = json.dumps([data_set.url for data_set in data_sets.DATA_SETS])
    for part in ("paul_graham_essays", "dev-v2.0.json", "hotpotqa"):
        assert part in urls
