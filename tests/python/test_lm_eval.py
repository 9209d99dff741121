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
    pytest.importorskip("lm_eval")
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


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_of_every_task_are_those_of_transformers_alone(
    own, remote_args, tasks, batch_size
):
    ours = evaluated("pbs", remote_args, tasks, TASKS, batch_size=batch_size)
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
