"""Calibration: the choice of thresholds as a function, and all of it with a server."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
from pbs_client import (
    Attention,
    Client,
    InvalidArgumentError,
    MeanPooling,
    ModelInfo,
    Pbs,
    _messages,
)
from pbs_client.calibration import (
    Calibrator,
    HeadCurves,
    allocate,
    best_uniform,
    check_name,
    divergence,
)
from pbs_client.cli import main
from pbs_client.cli.calibrate import PROMPTS_MAX, over_budget, read_prompts
from real_server import RECALL_MODEL, refused_start, running_server

LADDER = (0.3, 0.5, 0.7, 0.9)
SEEDS = range(20)


def random_curves(seed: int, heads: int = 12) -> HeadCurves:
    """Curves that fall on the whole and are noisy, as measured ones are."""
    stream = np.random.default_rng(seed)
    density = np.sort(stream.uniform(0.05, 1, (len(LADDER), heads)), axis=0)
    lost = np.sort(stream.uniform(0, 0.5, (len(LADDER), heads)), axis=0)[::-1]
    return HeadCurves(LADDER, density, lost + stream.normal(0, 0.01, lost.shape))


def point_of(curves: HeadCurves, head: int, threshold: float) -> tuple[float, float]:
    """Density and lost mass of a head at a threshold."""
    if threshold == 1:
        return 1.0, 0.0
    at = curves.thresholds.index(threshold)
    return curves.density[at, head], float(np.clip(curves.lost_mass[at, head], 0, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_an_allocation_keeps_its_budget_and_says_what_it_costs(seed):
    curves = random_curves(seed)
    for budget in (0, 0.001, 0.01, 0.05, 0.2, 1):
        chosen = allocate(curves, budget)
        points = [point_of(curves, *pair) for pair in enumerate(chosen.thresholds)]
        density, lost = np.mean(points, axis=0)
        assert lost <= budget + 1e-12, f"seed {seed}"
        assert (chosen.density, chosen.lost_mass) == pytest.approx((density, lost))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_larger_budget_never_costs_more(seed):
    curves = random_curves(seed)
    densities = [allocate(curves, b).density for b in np.linspace(0, 0.5, 40)]
    assert all(a >= b for a, b in zip(densities, densities[1:])), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_threshold_for_every_head_costs_no_more_than_one_for_all(seed):
    curves = random_curves(seed)
    for budget in (0.01, 0.05, 0.1, 0.2):
        assert allocate(curves, budget).density <= best_uniform(curves, budget).density


@pytest.mark.parametrize("seed", SEEDS)
def test_no_other_choice_of_few_heads_is_better_by_more_than_a_step(seed):
    curves = random_curves(seed, heads=3)
    budget = 0.08
    choices = [
        np.mean([point_of(curves, *pair) for pair in enumerate(picked)], axis=0)
        for picked in np.stack(np.meshgrid(*[(*LADDER, 1)] * 3), -1).reshape(-1, 3)
    ]
    best = min(density for density, lost in choices if lost <= budget)
    assert best <= allocate(curves, budget).density + 1e-12
    assert allocate(curves, budget).density <= best + 1 / 3


@pytest.mark.parametrize("budget", [0, 0.02, 0.1, 0.3])
def test_heads_with_one_curve_get_one_threshold(budget):
    density = np.tile(np.array([[0.1], [0.2], [0.4], [0.8]]), 5)
    lost = np.tile(np.array([[0.3], [0.1], [0.04], [0.01]]), 5)
    chosen = allocate(HeadCurves(LADDER, density, lost), budget)
    assert len(set(chosen.thresholds)) == 1
    expected = {0: 1.0, 0.02: 0.9, 0.1: 0.5, 0.3: 0.3}
    assert chosen.thresholds[0] == expected[budget]


def test_heads_that_lose_more_get_higher_thresholds():
    density = np.tile(np.array([[0.1], [0.2], [0.4], [0.8]]), 2)
    lost = np.array([[0.8, 0.02], [0.6, 0.01], [0.4, 0.005], [0.2, 0.0]])
    chosen = allocate(HeadCurves(LADDER, density, lost), 0.12)
    assert chosen.thresholds[0] > chosen.thresholds[1]


def test_of_equal_points_the_higher_threshold_is_taken():
    same = np.full((4, 1), 0.5)
    chosen = allocate(HeadCurves(LADDER, same, np.zeros((4, 1))), 0.1)
    assert chosen.thresholds == (0.9,)


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan")])
def test_a_budget_outside_its_range_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget .* is outside \[0, 1\]"):
        allocate(random_curves(0), budget)


def test_divergence_is_zero_for_equal_logits_and_grows():
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    assert divergence(logits, logits + 5) == pytest.approx(0)
    assert 0 < divergence(logits, logits * 1.1) < divergence(logits, logits * 2)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "paper"])
def test_a_name_that_the_server_would_refuse_is_refused(name):
    with pytest.raises(ValueError, match="profile name"):
        check_name(name)


@pytest.mark.parametrize(
    ("attention", "rows", "message"),
    [
        (Attention("dense"), 8, "method dense has no threshold to calibrate"),
        (Attention(), 8, "method none has no threshold to calibrate"),
        (Attention(Pbs(threshold=0.9)), 8, "threshold 0.9 is what calibration chooses"),
        (Attention("pbs"), 0, r"coverage_rows 0 is outside \[1, 1024\]"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_call(attention, rows, message):
    model = ModelInfo.from_message(_messages.ModelInfo(name="m", num_layers=2))
    with (
        Client("127.0.0.1:1") as nobody,
        pytest.raises(ValueError, match=message),
    ):
        Calibrator(nobody, model, attention, coverage_rows=rows)


# ---- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 lines"),
        (b"[1]\n" * (PROMPTS_MAX + 1), f"has {PROMPTS_MAX + 1} lines"),
        (b"[1, 2]\n[1, 2", "line 2 is not JSON"),
        (b"[1, 2]\n{}", "line 2 is not a JSON list of integers, or empty"),
        (b"[1, 2]\n[]", "line 2 is not a JSON list of integers, or empty"),
        (b"[1.5]", "line 1 is not a JSON list of integers, or empty"),
    ],
)
def test_a_file_without_prompts_exits_with_2(tmp_path, capsys, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    words = f"calibrate --prompts {path} --budget 0.1 --output {tmp_path}/p.json"
    assert main([*words.split(), "--server", "127.0.0.1:1"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_prompts_are_lists_of_tokens_one_on_each_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("[1, 2]\n[3]\n")
    assert read_prompts(str(path)) == [[1, 2], [3]]


@pytest.mark.parametrize(
    "flags",
    [
        "--budget 2",
        "--budget x",
        "--budget 0.1 --thresholds 0.5,0.4",
        "--budget 0.1 --thresholds 0.5,1",
        "--budget 0.1 --thresholds x",
    ],
)
def test_flags_out_of_range_are_wrong_usage(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", "--prompts", "x", "--output", "y", *flags.split()])
    assert caught.value.code == 2


def test_a_profile_over_its_budget_on_the_check_is_told_with_a_next_step():
    found = {"lost_mass_budget": 0.02, "check_prompts": 3, "lost_mass": 0.029}
    assert over_budget(found) == (
        "warning: the profile loses 0.029 of the attention mass on the 3 prompts of the "
        "check, more than --budget 0.02; calibrate with more prompts, which are like "
        "those to serve, or with a --budget of 0.014"
    )


@pytest.mark.parametrize(
    "found",
    [
        {"lost_mass_budget": 0.02, "check_prompts": 3, "lost_mass": 0.02},
        {"lost_mass_budget": 0.02, "check_prompts": 0},
        {"lost_mass_budget": 0.0, "check_prompts": 1, "lost_mass": 1e-8},
    ],
    ids=["kept", "not checked", "nothing lost"],
)
def test_a_profile_that_keeps_its_budget_has_no_warning(found):
    assert over_budget(found) is None


# ---- with a server

OPTIONS = "--method pbs --block-size 16 --segment-size 64"


def write_prompts(path, count: int, tokens: int) -> str:
    stream = random.Random(5)
    lines = [[stream.randrange(2, 1000) for _ in range(tokens)] for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_calibrated_profile_is_served_and_does_what_it_promised(
    server, tmp_path, capsys
):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4, 600)
    profile = tmp_path / "mine.json"
    words = f"calibrate --server {server.target} --prompts {prompts} --budget 0.05"
    words += f" --thresholds 0.3,0.6,0.9 {OPTIONS} --output {profile}"
    assert main(words.split()) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == ["curve"] * 6 + ["check"] * 2 + ["profile"]
    found = lines[-1]
    assert (found["prompts"], found["check_prompts"], found["heads"]) == (2, 2, 8)
    assert found["predicted_lost_mass"] <= 0.05
    assert 0 < found["predicted_density"] <= found["uniform_predicted_density"]
    assert found["density"] == pytest.approx(found["predicted_density"], abs=0.1)
    assert found["kl"] >= 0
    tokens = read_prompts(prompts)[1]
    with serving_profiles(profile) as client:
        assert [entry.name for entry in client.models()[0].profiles] == ["paper", "mine"]
        attention = Attention(profile="mine", coverage_rows=64, dense_fallback=False)
        result = client.prefill("", tokens, attention)
        heads = np.concatenate([h.density for h in result.stats.layer_heads])
        assert heads.mean() == pytest.approx(lines[6]["density"], abs=1e-9)


ROWS = [[0.2, 1, 0.2, 1], [1, 1, 1, 0.2]]  # a threshold of every head


@contextlib.contextmanager
def serving_profiles(*files):
    flags = [word for file in files for word in ("--profile", f"recall={file}")]
    with (
        running_server("--model", f"recall={RECALL_MODEL}", *flags) as serving,
        Client(serving.target) as client,
    ):
        yield client


def test_a_served_profile_is_the_same_work_as_its_thresholds_in_a_request(
    client, tmp_path
):
    model = client.models()[0]
    file = tmp_path / "mine.json"
    options = {"mean_pooling": {"block_size": 16}, "dense_fallback": False}
    layers = [{"thresholds": row} for row in ROWS]
    file.write_text(
        json.dumps(
            {
                "name": "mine",
                "model_digest": model.model_digest,
                "attention": options,
                "layers": layers,
            }
        )
    )
    tokens = list(range(2, 602))
    brought = Attention(MeanPooling(16), dense_fallback=False, head_thresholds=ROWS)
    expected = client.prefill("", tokens, brought)
    with serving_profiles(file) as served:
        profile = served.models()[0].profiles[1]
        assert (profile.name, profile.dense_heads) == ("mine", 5)
        assert profile.mean_threshold == pytest.approx(0.7)
        assert profile.attention.method == MeanPooling(16, None, True)
        result = served.prefill("", tokens, Attention(profile="mine"))
        plain = served.prefill("", tokens, MeanPooling(16))
    assert result.sparsity_digest == expected.sparsity_digest != plain.sparsity_digest
    assert result.first_token == expected.first_token
    assert result.stats.layer_density == expected.stats.layer_density
    assert (result.stats.threshold, plain.stats.threshold) == (None, 0.9)


def test_a_prompt_so_short_that_it_runs_dense_is_refused(server, tmp_path, capsys):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 1, 50)
    words = f"calibrate --server {server.target} --prompts {prompts} --budget 0.05"
    words += f" {OPTIONS} --output {tmp_path}/p.json"
    assert main(words.split()) == 2
    assert "prompt 1 of 50 tokens is too short" in capsys.readouterr().err


def test_thresholds_of_heads_go_with_a_request(client):
    tokens = list(range(2, 602))
    attention = Attention(
        MeanPooling(16), head_thresholds=ROWS, coverage_rows=4, dense_fallback=False
    )
    heads = client.prefill("", tokens, attention).stats.layer_heads
    dense = [[share == 1 for share in layer.density] for layer in heads]
    assert dense == [[x == 1 for x in row] for row in ROWS]
    with pytest.raises(InvalidArgumentError, match=r"layers has 1 entries"):
        client.prefill("", tokens, Attention("pbs", head_thresholds=ROWS[:1]))


def test_options_of_prefills_are_refused_by_attend(client):
    q = np.ones((1, 2, 4, 32), np.float32)
    for field in ({"profile": "paper"}, {"threshold_min": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(field))} is an option of prefill"):
            client.attend(q, q, q, Attention(**field))
    with pytest.raises(ValueError, match="profile 'paper' and method exclude"):
        Attention("pbs", profile="paper")


def test_the_paper_profile_and_threshold_min_are_flags(server, tmp_path, capsys):
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(list(range(2, 602))))
    words = ["prefill", "--server", server.target, "--tokens", str(tokens)]
    assert main([*words, "--profile", "paper"]) == 0
    named = json.loads(capsys.readouterr().out)
    assert main([*words, "--method", "pbs", "--as-published"]) == 0
    spelled = json.loads(capsys.readouterr().out)
    assert named["sparsity_digest"] == spelled["sparsity_digest"]
    assert main([*words, "--method", "pbs", "--threshold-min", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["threshold"] == 0.9
    assert main([*words, "--profile", "paper", "--method", "pbs"]) == 2
    assert "--profile and --method exclude" in capsys.readouterr().err
    assert main([*words, "--profile", "mine"]) == 3
    assert 'no profile "mine"; model "recall" has "paper"' in capsys.readouterr().err


def test_a_profile_of_another_model_does_not_start(tmp_path):
    path = tmp_path / "p.json"
    path.write_text('{"name": "p", "model_digest": "d", "attention": {"pbs": {}}}')
    said = refused_start("--model", f"m={RECALL_MODEL}", "--profile", f"m={path}")
    assert f"model m: profile {path}: model_digest" in said
