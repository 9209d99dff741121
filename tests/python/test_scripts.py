"""What scripts, the build and the benchmarks' drivers write down, and what they check."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from real_server import REPOSITORY, program

sys.path[:0] = [str(REPOSITORY / "tests" / name) for name in ("bench", "structure")]
import bench_common  # noqa: E402
import check_docs  # noqa: E402


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Runs git in a repository with one commit."""
    folder = tmp_path / "a repository"
    (folder / "docs/results").mkdir(parents=True)
    for name in ("kernel.cc", "README.md", "docs/results/old.json"):
        (folder / name).write_text("as committed")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def git(*words: str) -> str:
        who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        command = ["git", "-C", str(folder), *who, *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    git.folder = folder
    return git


# ---- tests/structure/check_docs.py


@pytest.mark.parametrize(
    ("body", "found"),
    [
        pytest.param("| 1 |\n\n[`x`](results/made.json): here", [], id="made"),
        pytest.param("No results file yet", ["name results/made.json"], id="none"),
        pytest.param("[x](results/other.json)", ["name results/made.json"], id="other"),
    ],
)
def test_a_figure_table_names_the_file_it_is_from(tmp_path, body, found):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/made.json").write_text("{}")
    page = tmp_path / "PAGE.md"
    page.write_text(f"# Figures\n\n<!-- table: made -->\n{body}\n<!-- end -->\n")
    messages = check_docs.tables_without_results(page)
    assert len(messages) == len(found)
    assert all(part in message for part, message in zip(found, messages))


def test_a_table_of_a_gpu_names_the_files_of_its_runs(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/gpu_1.json").write_text("{}")
    page = tmp_path / "PAGE.md"
    page.write_text(
        "<!-- table: gpu_server -->\n[1](results/gpu_1.json) [2](results/gpu_2.json)\n<!-- end -->\n"
    )
    assert check_docs.tables_without_results(page) == [
        "docs/PAGE.md: table gpu_server is from results/gpu_2.json, which is missing"
    ]


def test_a_table_that_waits_for_its_first_run_is_empty(tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text("<!-- table: gpu_server -->\n<!-- end -->\n")
    assert check_docs.tables_without_results(page) == []


def test_the_file_of_a_figure_table_exists(tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text("<!-- table: gone -->\n[x](results/gone.json)\n<!-- end -->\n")
    assert check_docs.tables_without_results(page) == [
        "docs/PAGE.md: table gone is from results/gone.json, which is missing"
    ]


# ---- tests/bench


@pytest.mark.parametrize(
    ("changed", "mark"),
    [
        pytest.param(None, "", id="nothing"),
        pytest.param("kernel.cc", "+changes", id="a source"),
        pytest.param("docs/results/old.json", "", id="results"),
        pytest.param("README.md", "", id="a table"),
    ],
)
def test_results_are_marked_when_what_was_measured_is_not_the_commit(
    repository, monkeypatch, changed, mark
):
    if changed is not None:
        (repository.folder / changed).write_text("changed")
    monkeypatch.setattr(bench_common, "ROOT", repository.folder)
    assert bench_common.commit() == repository("rev-parse", "HEAD") + mark


def test_a_tree_without_history_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_common, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert bench_common.commit() == "unknown"


def test_a_benchmark_worker_takes_any_path_and_says_what_is_wrong_with_it(tmp_path):
    worker = bench_common.Worker([str(program("bench_worker"))])
    try:
        # In the command, which the message repeats, the quotes are escaped.
        with pytest.raises(RuntimeError, match='no such "folder"/config.json'):
            worker.ask("model", path=str(tmp_path / 'no such "folder"'))
        with pytest.raises(RuntimeError, match="unknown command dance"):
            worker.ask("dance")
    finally:
        worker.close()


def simulate_scheduling(*options: str) -> tuple[int, dict]:
    """Exit status and figures of a minute of two long prompts and many short ones."""
    command = [str(program("scheduling_simulation")), "--seconds", "60", "--short-rate", "20"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout)


def test_a_simulated_long_prompt_is_delayed_by_its_yield_share_at_most():
    status, found = simulate_scheduling("--yield-share", "0", "0.25", "1")
    assert status == 0
    rows = {(row["yield_share"], row["batch_tokens_max"]): row for row in found["rows"]}
    assert set(rows) == {(share, batch) for share in (0, 0.25, 1) for batch in (1, 8192)}
    for (share, batch), row in rows.items():
        short, long = row["short"], row["long"]
        assert row["bound_holds"]
        assert long["prompts"] == 2 and 1000 < short["prompts"] < 1400
        assert short["p50_seconds"] <= short["p99_seconds"] <= short["max_seconds"]
        step = long["later_step_seconds_max"] / long["own_seconds_max"]
        assert long["delay_share_max"] <= share * 1.01 + step
        assert (row["prompts_per_run"] > 1) == (batch > 1)
    # This load uses up a quarter, and a whole is worth more to the short ones.
    assert rows[0.25, 1]["long"]["delay_share_max"] > 0.24
    p99 = [rows[share, 1]["short"]["p99_seconds"] for share in (0, 0.25, 1)]
    assert p99[0] > 1.2 * p99[1] > 2 * p99[2]


def test_a_simulation_repeats_and_follows_its_seed():
    options = ("--yield-share", "0.25", "--long-tokens", "32768")
    first = simulate_scheduling(*options)
    assert simulate_scheduling(*options) == first
    assert simulate_scheduling(*options, "--seed", "2")[1]["rows"] != first[1]["rows"]


def test_a_simulation_fails_when_a_long_prompt_is_delayed_by_more():
    # Patience is a share of what is predicted: twice too much gives twice the delay.
    status, found = simulate_scheduling("--yield-share", "0.25", "--prediction-factor", "2")
    assert status == 1
    assert [row["bound_holds"] for row in found["rows"]] == [False, False]
    assert found["rows"][0]["long"]["delay_share_max"] > 0.45


# ---- scripts/check.sh, scripts/bench.sh, .ci/run


@pytest.mark.parametrize(
    ("script", "kind"), [("check.sh", "gate"), ("bench.sh", "bench")]
)
@pytest.mark.parametrize("words", [[], ["dance"]], ids=["no name", "unknown name"])
def test_a_script_of_many_names_tells_them(tmp_path, script, kind, words):
    command = ["bash", str(REPOSITORY / "scripts" / script), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert (f"there is no {kind} dance" in done.stderr) == bool(words)
    text = (REPOSITORY / "scripts" / script).read_text()
    names = re.findall(rf"^{kind}_(\w+)\(\)", text, re.MULTILINE)
    told = set(re.findall(r"^(\w+)(?: \S+)*  ", done.stderr, re.MULTILINE))
    assert names and told == set(names)


def test_the_budgets_of_ci_are_the_hour_that_it_promises():
    text = (REPOSITORY / ".ci/run").read_text()
    minutes = [int(word) for word in re.findall(r"^gate (\d+) ", text, re.MULTILINE)]
    assert f"in at most {sum(minutes)} minutes" in text
    assert sum(minutes) <= 60


# ---- the build


def test_the_commit_of_a_build_follows_git_and_rewrites_nothing_else(repository):
    header = repository.folder / "build dir/commit.h"

    def written(*definitions: str) -> str:
        script = REPOSITORY / "cmake/WriteCommitHeader.cmake"
        where = [f"-DHEADER={header}", f"-DSOURCE_DIR={repository.folder}"]
        subprocess.run(["cmake", *where, *definitions, "-P", script], check=True)
        return header.read_text()

    first = repository("rev-parse", "--short=12", "HEAD")
    assert written() == f'#define PBS_COMMIT "{first}"\n'
    before = header.stat().st_mtime_ns
    assert written("-DCOMMIT=") == f'#define PBS_COMMIT "{first}"\n'
    assert header.stat().st_mtime_ns == before
    repository("commit", "--quiet", "--allow-empty", "-m", "second")
    second = repository("rev-parse", "--short=12", "HEAD")
    assert second != first
    assert written() == f'#define PBS_COMMIT "{second}"\n'
    assert written("-DCOMMIT=given") == '#define PBS_COMMIT "given"\n'
