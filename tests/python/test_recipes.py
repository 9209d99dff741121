"""pbs-client recipe: every experiment on a small model, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from attention_reference import attention
from pbs_client import Capture, Client, HeadsOfLayer
from pbs_client.cli import main
from pbs_client.recipes import (
    RECIPES,
    adaptive_segment,
    check_inputs,
    draw,
    find_recipe,
    measures,
    orders,
    run_recipe,
    segment_size,
    table_lines,
    tasks,
    threshold,
)
from pbs_client.recipes.base import Inputs, RecipeError
from pbs_client.recipes.tasks import Task, TaskError
from real_server import RECALL_MODEL

NAMES = [
    "identity",
    "segment-size",
    "threshold",
    "ttft",
    "proxy-correlation",
    "cost-share",
    "block-maps",
    "synthetic-task",
    "adaptive-segment",
]
PROMPT = json.loads((RECALL_MODEL / "prompt_8k.json").read_text())[:800]
NOBODY = "127.0.0.1:1"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(scope="module")
def inputs(server):
    """Heads, prompt and tasks of the bundled model."""
    question = json.loads((RECALL_MODEL / "prompt_8k.question.json").read_text())
    answer = json.loads((RECALL_MODEL / "prompt_8k.answer.json").read_text())
    asked = (*PROMPT[:300], *question)
    with Client(server.target) as client:
        yield Inputs(
            client,
            client.capture("recall", PROMPT, [0, 1]),
            "recall",
            PROMPT,
            (Task(asked, tuple(answer), "a"), Task(asked[1:], (0, 1), "b")),
            rounds=1,
        )


# ---- every recipe


def test_the_table_has_the_experiments_of_the_paper():
    assert list(RECIPES) == NAMES
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.question.endswith("?")
        assert set(recipe.needs) <= {"heads", "model", "tokens", "tasks"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_writes_a_table_with_its_origin_and_says_what_it_found(
    inputs, tmp_path, name
):
    recipe = RECIPES[name]
    run_recipe(recipe, inputs, tmp_path / "made", plot=False)
    path = tmp_path / "made" / f"{recipe.result_name}.json"
    result = json.loads(path.read_text())
    for field in ("machine", "commit", "server_commit", "command", "written"):
        assert result[field]
    assert result["inputs"]["model"] == "recall"
    assert result["rows"]
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    assert result["found"]
    assert len(table_lines(result)) == len(result["rows"]) + 1
    if HAS_MATPLOTLIB:
        plot = path.with_suffix(".svg")
        draw(recipe, result, plot)
        assert b"<svg" in plot.read_bytes()[:1000]


def run(name, inputs):
    return RECIPES[name].run(inputs)


def test_every_order_gives_dense_attention_when_every_block_is_selected(inputs):
    outcome = run("identity", inputs)
    assert outcome.figures["holds"]
    assert "yes" in outcome.found[0]


def test_the_proxy_of_the_recipe_is_that_of_the_server(inputs):
    assert run("proxy-correlation", inputs).figures["order_agreement"] > 0.999


def test_guarding_and_tails_are_measured_against_dense_itself(inputs):
    rows = {row[0]: row for row in run("synthetic-task", inputs).rows}
    assert rows["dense"][4] == rows["dense"][6] == 0
    assert all(row[6] >= -1e-9 for row in rows.values())


def test_a_choice_is_never_dearer_than_the_default_on_what_it_was_made_from():
    rng = np.random.default_rng(5)
    for _ in range(50):
        cost, coverage = rng.random((2, 3, 6))
        measured = adaptive_segment.Measured(cost, coverage, cost, np.zeros((3, 2)))
        chosen = adaptive_segment.choose(measured, 1, group=2)
        groups = np.arange(6) // 2
        for group in range(3):
            own = chosen[groups == group]
            assert len(set(own)) == 1
            heads = groups == group
            assert cost[own[0]][heads].mean() <= cost[1][heads].mean()
            least = coverage[1][heads].mean() - adaptive_segment.SLACK
            assert coverage[own[0]][heads].mean() >= least


# ---- measures


def test_attention_rows_are_those_of_the_definition():
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 40, 8)).astype(np.float32)
    rows = np.array([0, 7, 39])
    weights = measures.attention_rows(q, k, rows)
    v = np.eye(40)
    expected, _ = attention(q[None], k[None], v[None])
    np.testing.assert_allclose(weights, expected[0][rows], atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 3], [10, 20, 90], 1), ([1, 2, 3], [3, 2, 1], -1), ([1], [1], 0)],
)
def test_a_rank_correlation_sees_order_only(a, b, expected):
    found = measures.rank_correlation(np.array(a), np.array(b))
    assert found == pytest.approx(expected)


def test_a_random_order_stays_inside_whole_segments():
    order = orders.random_order(2, 70, 32, seed=3)[0]
    for head in order:
        assert sorted(head[:32]) == list(range(32))
        assert sorted(head[32:64]) == list(range(32, 64))
        assert list(head[64:]) == list(range(64, 70))
        assert list(head[:32]) != list(range(32))


@pytest.mark.parametrize(
    ("costs", "expected"),
    [([1.0, 0.5, 0.45, 0.44], 256), ([1.0, 0.9, 0.2, 0.1], 512), ([0.5, 0.4], 256)],
)
def test_the_elbow_is_where_the_curve_bends(costs, expected):
    sizes = segment_size.SEGMENTS[: len(costs)]
    assert segment_size.elbow(sizes, costs) == expected


def test_the_front_has_what_nothing_beats_in_both():
    rows = [["a", 0, 0.5, 0, 0.1], ["b", 0, 0.4, 0, 0.2], ["c", 0, 0.6, 0, 0.15]]
    assert threshold.pareto(rows) == {0, 1}


# ---- refusals


def test_an_unknown_name_lists_the_known_ones(capsys):
    with pytest.raises(RecipeError, match="'nothing' is not one of identity, segment"):
        find_recipe("nothing")
    assert main(["recipe", "nothing", "--server", NOBODY]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in NAMES)


def test_the_list_needs_no_server(capsys):
    assert main(["recipe", "--list", "--server", NOBODY]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == NAMES


def test_no_name_is_refused(capsys):
    assert main(["recipe", "--server", NOBODY]) == 2
    assert "name one of identity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("identity", "--heads FILE"),
        ("ttft", "--model NAME"),
        ("synthetic-task", "--model NAME"),
    ],
)
def test_what_a_recipe_lacks_is_named_by_its_flag(name, flag, capsys):
    assert main(["recipe", name, "--server", NOBODY]) == 2
    assert f"recipe {name} needs {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "identity --heads x --model recall",
            "recipe identity does not take --model; it takes --heads",
        ),
        (
            "ttft --model recall --tokens x --heads y",
            "recipe ttft does not take --heads; it takes --model and --tokens",
        ),
    ],
)
def test_an_input_that_a_recipe_does_not_take_is_refused(words, message, capsys):
    assert main(["recipe", *words.split(), "--server", NOBODY]) == 2
    assert capsys.readouterr().err == f"pbs-client: {message}\n"


def test_a_recipe_with_a_model_and_no_prompt_names_the_flag(inputs):
    with pytest.raises(RecipeError, match="needs --tokens FILE"):
        check_inputs(RECIPES["ttft"], Inputs(inputs.client, model="recall"))
    with pytest.raises(RecipeError, match="needs --tasks FILE"):
        check_inputs(RECIPES["synthetic-task"], Inputs(inputs.client, model="recall"))


def test_an_unreadable_capture_is_refused_before_any_work(tmp_path, capsys):
    path = tmp_path / "heads.safetensors"
    path.write_bytes(b"nothing")
    command = ["recipe", "identity", "--server", NOBODY, "--heads", str(path)]
    assert main(command) == 2
    assert f"{path}: the file has 7 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("rounds", ["0", "1001", "x", "-1"])
def test_rounds_outside_their_range_are_wrong_usage(rounds, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["recipe", "ttft", f"--rounds={rounds}"])
    assert caught.value.code == 2
    assert "is not in 1..1000" in capsys.readouterr().err


def test_a_capture_too_short_for_the_correlation_is_refused(inputs):
    rng = np.random.default_rng(1)
    short = rng.standard_normal((2, 100, 64)).astype(np.float32)
    heads = Capture({0: HeadsOfLayer(short, short, short)}, "m", "d")
    with pytest.raises(RecipeError, match="needs 768 tokens; the capture has 100"):
        run("proxy-correlation", Inputs(inputs.client, heads))


def test_without_matplotlib_it_says_what_to_install_before_it_works(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'pbs-client\[recipes\]'"):
        run_recipe(RECIPES["identity"], inputs, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- files of tasks


def test_tasks_survive_a_round_trip(tmp_path):
    made = (Task((1, 2), (3,), "a"), Task((4,), (5, 6), "b"))
    tasks.write(tmp_path / "tasks.json", made)
    assert tasks.read(tmp_path / "tasks.json") == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[", "not JSON", id="cut"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        pytest.param("{}", "not a list of 1 to 10000 tasks", id="object"),
        pytest.param("[]", "not a list of 1 to 10000 tasks", id="empty"),
        pytest.param("[1]", "task 0 has not exactly tokens, answer", id="number"),
        pytest.param('[{"tokens": [1], "answer": [1]}]', "has not exactly", id="kind"),
        pytest.param(
            '[{"tokens": [], "answer": [1], "kind": "a"}]',
            "task 0: tokens is not a list",
            id="no tokens",
        ),
        pytest.param(
            '[{"tokens": [1], "answer": [true], "kind": "a"}]',
            "task 0: answer is not a list",
            id="boolean",
        ),
        pytest.param(
            '[{"tokens": [-1], "answer": [1], "kind": "a"}]',
            "task 0: tokens is not a list",
            id="negative",
        ),
        pytest.param(
            '[{"tokens": [1], "answer": [1], "kind": ""}]',
            "kind has not 1 to 64",
            id="no kind",
        ),
        pytest.param(
            json.dumps([{"tokens": [1], "answer": [1] * 65, "kind": "a"}]),
            "answer has more than 64 tokens",
            id="answers",
        ),
    ],
)
def test_a_file_without_tasks_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "tasks.json"
    path.write_text(text)
    with pytest.raises(TaskError, match=message) as caught:
        tasks.read(path)
    assert str(caught.value).startswith(str(path))


def test_any_damage_to_tasks_is_a_task_error_or_other_tasks(tmp_path):
    path = tmp_path / "tasks.json"
    tasks.write(path, (Task((1, 2), (3,), "a"), Task((4,), (5, 6), "b")))
    whole = path.read_bytes()
    rng = np.random.default_rng(7)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] = int(rng.integers(256))
        path.write_bytes(bytes(damaged[: int(rng.integers(1, len(whole) + 1))]))
        try:
            tasks.read(path)
        except TaskError:
            continue
