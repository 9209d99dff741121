"""lm-evaluation-harness over a remote prefill scores as over transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from real_server import REPOSITORY, running_server

pytestmark = pytest.mark.peers

TASKS = ("tiny_generate", "tiny_choice", "tiny_likelihood")
RUN_SECONDS_MAX = 300


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """The harness asks a hub for nothing; its data sets are built in a new folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    yield
    patch.undo()


@pytest.fixture(scope="module", params=["llama"])
def folder(request, tmp_path_factory):
    import tiny_models

    (name,) = (n for n in tiny_models.MODELS if n.startswith(request.param))
    return tiny_models.make(name, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import tiny_tokenizer

    made = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.make(made)
    return made


@pytest.fixture(scope="module")
def tiny_server(folder):
    with running_server(f"--model=tiny={folder}") as server:
        yield server


@pytest.fixture(scope="module")
def model_args(folder, tokenizer):
    """Of the harness's own model."""
    return {"pretrained": str(folder), "tokenizer": str(tokenizer), "dtype": "float32"}


@pytest.fixture(scope="module")
def remote_args(model_args, tiny_server):
    return {**model_args, "server": tiny_server.target, "method": "dense"}


@pytest.fixture(scope="module")
def tasks(model_args, tmp_path_factory):
    """The folder of tasks; transformers alone is right in every second question."""
    import lm_eval_tasks

    made = tmp_path_factory.mktemp("tasks")
    count = lm_eval_tasks.QUESTIONS
    lm_eval_tasks.write(made, ["w1 w2"] * count, [0] * count)
    found = evaluated("hf", model_args, made, ("tiny_generate", "tiny_choice"))
    said, chosen = [], []
    for sample in found["samples"]["tiny_generate"]:
        said.append(sample["filtered_resps"][0].strip())
    for sample in found["samples"]["tiny_choice"]:
        likelihoods = [answer[0] for answer in sample["filtered_resps"]]
        chosen.append(likelihoods.index(max(likelihoods)))
    for index in range(0, count, 2):
        said[index] = "w1 w2"
        chosen[index] = (chosen[index] + 1) % len(lm_eval_tasks.CHOICES)
    lm_eval_tasks.write(made, said, chosen)
    return made


def evaluated(model, arguments, folder, names, **more):
    """The result of the harness, samples by their number."""
    import lm_eval
    import pbs_client.lm_eval  # noqa: F401  registers pbs
    from lm_eval.tasks import TaskManager

    done = lm_eval.simple_evaluate(
        model=model,
        model_args=dict(arguments),
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        **{"batch_size": 4, **more},
    )
    for samples in done["samples"].values():
        samples.sort(key=lambda sample: sample["doc_id"])
    return done


@pytest.fixture(scope="module")
def own(model_args, tasks):
    return evaluated("hf", model_args, tasks, TASKS)


def answers_of(done, task):
    """What the model answered to each question."""
    return [sample["filtered_resps"] for sample in done["samples"][task]]


def test_the_model_is_registered_and_its_module_imported_when_it_is_used():
    code = (
        "import sys, pbs_client.lm_eval\n"
        "from lm_eval.api.registry import get_model\n"
        "assert 'pbs_client.lm_eval.model' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "print(get_model('pbs').__name__)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "client/python")},
        check=True,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
    )
    assert ended.stdout.strip() == "PbsLM"


def test_scores_of_every_task_are_those_of_transformers_alone(own, remote_args, tasks):
    ours = evaluated("pbs", remote_args, tasks, TASKS)
    for task in TASKS:
        for metric, value in own["results"][task].items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            assert ours["results"][task][metric] == same, (task, metric)
    assert own["results"]["tiny_generate"]["exact_match,none"] == 0.5
    assert own["results"]["tiny_choice"]["acc,none"] == 0.5
    assert answers_of(ours, "tiny_generate") == answers_of(own, "tiny_generate")
    for task in ("tiny_choice", "tiny_likelihood"):
        for ours_one, own_one in zip(answers_of(ours, task), answers_of(own, task)):
            assert [a[1] for a in ours_one] == [a[1] for a in own_one]
            assert [a[0] for a in ours_one] == pytest.approx(
                [a[0] for a in own_one], abs=1e-3
            )


def test_the_result_says_what_the_server_did(remote_args, tasks, tiny_server):
    from pbs_client import Client

    sparse = {**remote_args, "method": "pbs", "block_size": 16, "segment_size": 32}
    sparse |= {"threshold": 0.3, "dense_fallback": False, "dense_tail_blocks": 0}
    done = evaluated("pbs", sparse, tasks, ("tiny_choice",))
    config = done["config"]
    with Client(tiny_server.target) as client:
        (served,) = client.models()
    assert config["pbs_model_digest"] == served.model_digest
    assert any(digest.startswith("pbs-") for digest in config["pbs_sparsity_digests"])
    assert config["pbs_prefills"] == 12  # one for each question, not for each choice
    assert 0 < config["pbs_mean_density"] < 1


# ---- what is refused


REFUSED = {
    # arguments of the model; what the message says
    "adapters": ({"peft": "folder"}, "does not support peft: the server has other weights"),
    "weights that are added": ({"delta": "folder"}, "does not support delta"),
    "several devices": ({"parallelize": True}, "does not support parallelize"),
    "an encoder": ({"backend": "seq2seq"}, "does not support backend"),
    "batches of any size": ({"batch_size": "auto:4"}, "does not support batch_size auto"),
    "no method": ({"method": "fast"}, "method 'fast' is not one of"),
    "an option of another method": ({"gamma": 0.9}, "--method dense does not have it"),
    "longer than the server takes": ({"max_length": 4096}, "exceeds tokens_max 2048"),
}


@pytest.mark.parametrize(("arguments", "named"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(remote_args, arguments, named):
    from pbs_client.lm_eval.model import PbsLM

    with pytest.raises(ValueError, match=named):
        PbsLM(**{**remote_args, "device": "cpu", **arguments})


def test_a_task_without_contexts_is_refused(remote_args, tasks):
    with pytest.raises(ValueError, match="nothing to prefill .* --model hf"):
        evaluated("pbs", remote_args, tasks, ("tiny_rolling",))


def test_contexts_that_are_too_long_lose_their_beginning(model_args, remote_args, tasks):
    short = {"max_length": 32}
    own = evaluated("hf", {**model_args, **short}, tasks, ("tiny_choice",))
    ours = evaluated("pbs", {**remote_args, **short}, tasks, ("tiny_choice",))
    for ours_one, own_one in zip(
        answers_of(ours, "tiny_choice"), answers_of(own, "tiny_choice")
    ):
        assert [a[0] for a in ours_one] == pytest.approx([a[0] for a in own_one], abs=1e-3)


# ---- the command


def run_command(folder, *words):
    """`python -m pbs_client.lm_eval`, in a folder; (exit status, output, errors)."""
    ended = subprocess.run(
        [sys.executable, "-m", "pbs_client.lm_eval", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "client/python")},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_the_command_runs_a_settings_file(own, remote_args, tasks, tmp_path):
    chosen = tmp_path / "mine.json"
    given = {name: remote_args[name] for name in ("method", "dtype", "tokenizer")}
    chosen.write_text(json.dumps({"tasks": list(TASKS), "model_args": given}))
    status, _, errors = run_command(
        tmp_path,
        *("--settings", chosen, "--include_path", tasks, "--output_path", "out"),
        *("--model_args", f"server={remote_args['server']}"),
        f"pretrained={remote_args['pretrained']}",
        *("--device", "cpu", "--batch_size", "4"),
    )
    assert status == 0, errors
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["pbs_sparsity_digests"] == ["exact"]
    for task in TASKS:
        for metric, value in own["results"][task].items():
            if not isinstance(value, str):
                found = results["results"][task][metric]
                assert found == pytest.approx(value, rel=1e-4), (task, metric)


FAILURES = {
    # words of the command; the error
    "a data set that is not here": (
        ("--settings", "dense", "longbench"),
        "data set Xnhyacinth/LongBench (longbench) is not on this machine, and its "
        "download failed: https://huggingface.co/datasets/Xnhyacinth/LongBench",
    ),
    "another data set that is not here": (
        ("--settings", "dense", "longbench2"),
        "https://huggingface.co/datasets/recursal/longbench-v2",
    ),
    "settings that there are not": (
        ("--settings", "fast"),
        "settings 'fast' cannot be read",
    ),
    "a server that is gone": (
        ("--model", "pbs", "--tasks", "tiny_choice", "--model_args", "server=127.0.0.1:1"),
        "error: UNAVAILABLE",
    ),
}


@pytest.mark.parametrize(("words", "named"), FAILURES.values(), ids=FAILURES)
def test_the_command_names_what_failed(remote_args, tasks, tmp_path, words, named):
    known = [f"{name}={remote_args[name]}" for name in ("pretrained", "tokenizer")]
    server = [] if "--model_args" in words else [f"server={remote_args['server']}"]
    status, _, errors = run_command(
        tmp_path, *words, "--include_path", tasks, "--model_args", *known, *server,
        "--device", "cpu",
    )  # fmt: skip
    assert status == 1
    assert named in errors
    assert "Traceback" not in errors


def test_the_list_of_settings_says_what_they_are(tmp_path):
    status, lines, _ = run_command(tmp_path, "--settings-list")
    assert status == 0
    listed = dict(line.split(maxsplit=1) for line in lines.splitlines())
    assert listed["pbs"].startswith("PBS-Attn: blocks of 128")
    assert {"dense", "longbench", "longbench2", "ruler"} <= set(listed)


@pytest.fixture
def long_bench(tmp_path):
    """Data sets of LongBench and LongBench-v2, by their names, with made-up content."""
    rows = {
        "Xnhyacinth/LongBench": ("qasper", "test", {
            "context": "w1 w2 w3 " * 40, "question": "question w5", "answers": ["w9"],
        }),
        "recursal/longbench-v2": ("academic_single", "train", {
            "context": "w4 w5 w6 " * 40, "question": "question w7", "answer": "B",
            "choices": ["w1", "w2", "w3", "w4"],
        }),
    }  # fmt: skip
    for name, (part, split, row) in rows.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
        config = {"config_name": part}
        config["data_files"] = [{"split": split, "path": "rows.jsonl"}]
        card = json.dumps({"configs": [config]})
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return tmp_path


def test_the_tasks_of_long_bench_read_their_data_sets(remote_args, long_bench):
    known = [
        f"{name}={remote_args[name]}" for name in ("pretrained", "tokenizer", "server")
    ]
    status, _, errors = run_command(
        long_bench,
        *("--settings", "pbs", "longbench", "longbench2", "--output_path", "out"),
        *("--tasks", "longbench_qasper", "longbench2_academic_single"),
        *("--gen_kwargs", "max_gen_toks=16", "--device", "cpu", "--model_args"),
        *(*known, "dtype=float32"),
    )
    assert status == 0, errors
    (path,) = (long_bench / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["n-samples"]["longbench_qasper"]["effective"] == 3
    assert 0 <= results["results"]["longbench2_academic_single"]["acc,none"] <= 1
    assert results["config"]["model_args"]["threshold"] == 0.9
    assert results["config"]["pbs_prefills"] == 3 + 1  # continuations share a context
