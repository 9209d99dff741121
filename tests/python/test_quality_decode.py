"""tests/quality and its driver: figures are those of whole passes, and runs go on."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from pbs_client import Client, Dense, MeanPooling, UnimplementedError
from real_server import REPOSITORY, running_server

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file, save_file  # noqa: E402

sys.path[:0] = [
    str(REPOSITORY / f"tests/{name}") for name in ("quality", "models", "bench")
]
import exposing_layers  # noqa: E402
import settings  # noqa: E402
from decode_tier import (  # noqa: E402
    DecodeTier,
    Segment,
    TextOutcome,
    mean_divergence,
    score,
)
from measure import EXPOSED, MODEL, Measurer, ProcessClock, TextPrompt  # noqa: E402
from model_quality import Plan, Run  # noqa: E402
from pbs_client import Attention  # noqa: E402
from retrieval_tasks import Question, RetrievalPrompt  # noqa: E402
from run_log import RunLog  # noqa: E402

LAYERS, VOCABULARY, TOKENS = 2, 200, 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model, and the same with exposing layers."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=160, intermediate_size=96, head_dim=32,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / MODEL)
    weights = load_file(folder / MODEL / "model.safetensors")
    added = exposing_layers.add_exposing_layers(weights, LAYERS)
    (folder / EXPOSED).mkdir()
    contiguous = {name: np.ascontiguousarray(w) for name, w in weights.items()}
    save_file(contiguous, folder / EXPOSED / "model.safetensors")
    described = json.loads((folder / MODEL / "config.json").read_text())
    described["num_hidden_layers"] = LAYERS + added
    (folder / EXPOSED / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def served(folders):
    flags = [f"{name}={folders / name}" for name in (MODEL, EXPOSED)]
    with running_server("--model", flags[0], "--model", flags[1]) as server:
        with Client(server.target) as client:
            tier = DecodeTier(folders / MODEL)
            yield client, tier, Measurer(client, ProcessClock(server.process.pid), tier)


def tokens_of(seed: int, count: int = TOKENS) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist())


def whole_logits(tier: DecodeTier, tokens) -> torch.Tensor:
    with torch.no_grad():
        return tier.model(torch.tensor([list(tokens)])).logits[0]


def test_packed_segments_are_computed_as_if_each_were_alone(served):
    client, tier, _ = served
    prompt = tokens_of(1)
    cache = client.prefill(MODEL, prompt, Dense(), delivery="inline").kv
    segments = [Segment(TOKENS, tokens_of(2, 5)), Segment(200, tokens_of(3, 9)),
                Segment(250, ()), Segment(200, tokens_of(4, 3))]  # fmt: skip
    for segment, logits in zip(segments, tier.logits_after(cache, segments)):
        alone = whole_logits(tier, prompt[: segment.prefix] + segment.tokens)
        wanted = alone[segment.prefix :]
        torch.testing.assert_close(logits, wanted, atol=2e-3, rtol=0)


def test_a_texts_figures_are_those_of_the_model_itself(served):
    _, tier, measurer = served
    tokens, following = tokens_of(5), tokens_of(6, 8)
    figures, outcome = measurer.text(
        TextPrompt("kjv", tokens, following), Attention(Dense()), None
    )
    logits = whole_logits(tier, tokens + following)
    wanted = torch.tensor(tokens[1:] + following)
    losses = torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none")
    np.testing.assert_allclose(outcome.nll, losses[: TOKENS - 1], atol=2e-3)
    follow = float(losses[TOKENS - 1 :].mean())
    assert figures["continuation_nll"] == pytest.approx(follow, abs=2e-3)
    assert (outcome.top == logits[:TOKENS].argmax(-1).numpy()).mean() > 0.99
    assert figures["top1_agreement"] == 1
    assert figures["kl_last_64"] == 0


def test_the_work_of_exposing_layers_is_not_counted(served):
    client, _, measurer = served
    prompt = TextPrompt("kjv", tokens_of(7), tokens_of(8, 4))
    figures, _ = measurer.text(prompt, Attention(Dense()), None)
    plain = client.prefill(MODEL, tokens_of(7), Dense())
    assert figures["executed_flops"] == pytest.approx(plain.stats.executed_flops)


def test_an_answer_in_the_prompt_and_one_over_the_cache_are_scored_alike(served):
    _, tier, measurer = served
    context, asked = tokens_of(9), tokens_of(10, 6)
    begin = len(context) + len(asked)
    answer: tuple[int, ...] = ()
    for _ in range(4):  # what greedy decoding gives
        logits = whole_logits(tier, context + asked + answer)
        answer += (int(logits[-1].argmax()),)
    losses = torch.nn.functional.cross_entropy(
        whole_logits(tier, context + asked + answer)[begin - 1 : -1],
        torch.tensor(answer),
    )
    accepted = tuple(frozenset([token]) for token in answer)
    question = Question("keys", asked, answer, ((0, 4),), accepted, 0.5)
    prompt = RetrievalPrompt("noise", context, (question, question))
    figures = measurer.retrieval(prompt, Attention(Dense()))
    assert [a["whole"] for a in figures["answers"]] == [True, True]
    assert [a["in_prompt"] for a in figures["answers"]] == [True, False]
    for scored in figures["answers"]:
        assert scored["nll"] == pytest.approx(float(losses), abs=2e-3)


def test_a_part_is_right_when_all_of_its_tokens_are():
    logits = torch.eye(4) * 9  # row i predicts token i
    accepted = tuple(frozenset(ids) for ids in ([0], [1], [3], [2, 3]))
    question = Question("values", (), (0, 1, 3, 3), ((0, 2), (2, 4)), accepted, None)
    scored = score(question, logits)
    assert (scored.parts_right, scored.whole, scored.first_right) == (0.5, False, True)


def test_the_divergence_of_equal_rows_is_zero_and_of_others_above():
    rows = torch.randn(3, 8).log_softmax(-1).numpy()
    assert mean_divergence(rows, rows) == 0
    assert mean_divergence(rows, rows[::-1]) > 0


# ---- tests/bench/model_quality.py


class FakePrompts:
    """Prompts that only say where they stand."""

    def text(self, length: int, index: int) -> TextPrompt:
        return TextPrompt("kjv", (length, index), ())

    def retrieval(self, length: int, index: int) -> tuple[int, int]:
        return length, index


class FakeMeasurer:
    """Has losses by threshold, and refuses what the server would."""

    def __init__(self):
        self.calls: list[tuple] = []

    def text(self, prompt, attention, dense):
        self._called("text", prompt.tokens, attention)
        threshold = getattr(attention.method, "threshold", 1)
        nll = 2.0 if threshold == 1 else 2.0 + (1 - threshold)
        figures = {"text": "kjv", "nll": nll, "nll_by_position": [nll],
                   "continuation_nll": 2.0, "top1_agreement": 1.0, "kl_last_64": 0.0,
                   **self._work()}  # fmt: skip
        return figures, TextOutcome(np.zeros(1), np.zeros(2), np.zeros((1, 2)))

    def retrieval(self, prompt, attention):
        self._called("retrieval", prompt, attention)
        answer = {"task": "keys", "depth": 0.5, "in_prompt": True, "parts_right": 1.0,
                  "whole": True, "first_right": True}  # fmt: skip
        return {"haystack": "kjv", "score": 1.0, "answer_nll": 1.0, "answers": [answer],
                **self._work()}  # fmt: skip

    def _called(self, kind, where, attention):
        if isinstance(attention.method, MeanPooling):
            raise UnimplementedError("mean_pooling is not here")
        threshold = getattr(attention.method, "threshold", None)
        self.calls.append((kind, *where, threshold))

    def _work(self) -> dict:
        return {"coverage": 1.0, "executed_flops": 1.0, "cpu_seconds": 1.0,
                "attention_seconds": 1.0}  # fmt: skip


DENSE = settings.Setting("dense", "Dense", {})
NEAR = settings.Setting("pbs", "Pbs", {"threshold": 0.999})
FAR = settings.Setting("pbs", "Pbs", {"threshold": 0.5})
REFUSED = settings.Setting("mean_pooling", "MeanPooling", {"threshold": 0.9})


def run_of(folder, *others, prompts=3, deadline=float("inf"), screen=True):
    plan = Plan((DENSE, *others), (2048, 4096), prompts, 1, deadline, screen)
    measurer = FakeMeasurer()
    log = RunLog(folder / "log.jsonl", {"of": "a test"})
    return Run(plan, FakePrompts(), measurer, log, folder / "dense"), measurer


def test_a_run_measures_every_setting_on_a_prompt_before_the_next_prompt(tmp_path):
    run, measurer = run_of(tmp_path, NEAR, prompts=1)
    assert run.measure()
    assert measurer.calls == [
        (kind, length, 0, threshold)
        for length in (2048, 4096)
        for kind in ("text", "retrieval")
        for threshold in (None, 0.999)
    ]
    assert run.results()["choice"]["setting"] == "dense"  # of one prompt nothing holds


def test_a_run_goes_on_and_repeats_nothing(tmp_path):
    run, _ = run_of(tmp_path, NEAR, prompts=2)
    assert run.measure()
    again, measurer = run_of(tmp_path, NEAR, prompts=3)
    assert again.measure()
    assert {index for _, _, index, _ in measurer.calls} == {2}
    assert again.figures_of(NEAR.name)[2048]["text"]["nll"].n == 3


def test_results_have_what_earlier_calls_measured(tmp_path):
    pbs = next(s for s in settings.all_settings() if s.name == "pbs 0.9")
    run, _ = run_of(tmp_path, pbs, prompts=1)
    assert run.measure()
    later, measurer = run_of(tmp_path, NEAR, prompts=1)
    assert later.measure()
    assert 0.9 not in {call[-1] for call in measurer.calls}
    assert set(later.results()["settings"]) == {"dense", "pbs 0.9", NEAR.name}


def test_a_run_ends_when_its_time_is_over(tmp_path):
    run, measurer = run_of(tmp_path, NEAR, deadline=0)
    assert not run.measure()
    assert not measurer.calls
    assert run.results()["lengths"] == []


def test_a_setting_that_is_far_out_on_short_prompts_is_measured_no_further(tmp_path):
    run, measurer = run_of(tmp_path, NEAR, FAR)
    assert run.measure()
    far = [call for call in measurer.calls if call[-1] == 0.5]
    assert {call[1:3] for call in far} == {(2048, 0), (2048, 1)}
    assert run.results()["screened"] == [FAR.name]
    whole, measurer = run_of(tmp_path / "whole", FAR, screen=False)
    assert whole.measure()
    assert len([call for call in measurer.calls if call[-1] == 0.5]) == 2 * 2 * 3


def test_a_setting_that_the_server_refuses_is_skipped_and_named(tmp_path):
    run, measurer = run_of(tmp_path, REFUSED, NEAR)
    assert run.measure()
    results = run.results()
    assert list(results["settings"]) == ["dense", NEAR.name]
    assert "mean_pooling is not here" in results["skipped"][REFUSED.name]
    assert results["choice"]["setting"] == "dense"


def test_a_lost_dense_outcome_is_made_again(tmp_path):
    run, _ = run_of(tmp_path, prompts=1)
    assert run.measure()
    shutil.rmtree(tmp_path / "dense")
    again, measurer = run_of(tmp_path, NEAR, prompts=1)
    assert again.measure()
    assert [c[1:] for c in measurer.calls if c[0] == "text" and c[-1] is None] == [
        (2048, 0, None),
        (4096, 0, None),
    ]
