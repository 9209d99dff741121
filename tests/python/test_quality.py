"""tests/quality: prompts have their answers, the rule chooses, an ended run goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys

import numpy as np
import pytest
from real_server import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests/quality"))
import haystacks  # noqa: E402
import retrieval_tasks  # noqa: E402
import rule  # noqa: E402
import settings  # noqa: E402
import summary  # noqa: E402
from run_log import OtherRunError, RunLog  # noqa: E402

VERSES = [f" And verse {i} was long, and it was good." for i in range(50)]


class WordTokenizer:
    """Every word with the space before it, and every other character, is a token."""

    def __init__(self):
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r" ?[A-Za-z_|]+|\d|.|\n", text)
        return [self._ids.setdefault(piece, len(self._ids)) for piece in pieces]

    def decode(self, tokens) -> str:
        names = list(self._ids)
        return "".join(names[token] for token in tokens)


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


def make(tokenizer, haystack="kjv", first="single", num_tokens=1000, seed=1):
    rng = np.random.default_rng(seed)
    text = haystacks.Text(VERSES, tokenizer.encode)
    return retrieval_tasks.make_prompt(
        rng, haystack, first, num_tokens, text, tokenizer.encode
    )


# ---- prompts


@pytest.mark.parametrize("haystack", haystacks.HAYSTACKS)
@pytest.mark.parametrize("num_tokens", [900, 1001, 4096])
def test_a_prompt_has_exactly_the_tokens_that_were_asked_for(
    tokenizer, haystack, num_tokens
):
    first = "words" if haystack == "words" else "keys"
    prompt = make(tokenizer, haystack, first, num_tokens)
    assert len(prompt.tokens) == num_tokens
    assert prompt.questions[0].task == first


@pytest.mark.parametrize("haystack", haystacks.HAYSTACKS)
def test_every_part_of_an_answer_is_in_the_context(tokenizer, haystack):
    for seed in range(8):
        prompt = make(tokenizer, haystack, seed=seed)
        context = tokenizer.decode(prompt.context)
        for question in prompt.questions:
            for begin, end in question.parts:
                part = tokenizer.decode(question.answer[begin:end]).strip()
                assert re.search(rf"\b{part}\b", context), (seed, question.task, part)


def test_the_tasks_are_those_of_the_list_and_words_are_asked_of_word_lists_only(
    tokenizer,
):
    asked = {h: {q.task for q in make(tokenizer, h).questions} for h in haystacks.HAYSTACKS}
    assert asked["words"] == set(retrieval_tasks.TASKS)
    assert asked["kjv"] == asked["noise"] == set(retrieval_tasks.TASKS) - {"words"}


def test_the_needle_stands_at_the_depth_that_is_stated(tokenizer):
    for seed in range(8):
        prompt = make(tokenizer, num_tokens=4000, seed=seed)
        single = prompt.questions[0]
        code = tokenizer.decode(single.answer)
        before = tokenizer.decode(prompt.context).index(code) / len(
            tokenizer.decode(prompt.context)
        )
        assert abs(before - single.depth) < 0.05, f"seed {seed}"


def test_needles_of_many_prompts_sweep_the_depth(tokenizer):
    depths = [make(tokenizer, seed=seed).questions[0].depth for seed in range(40)]
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() > 0


def test_values_count_in_any_order_and_only_once(tokenizer):
    (values,) = [q for q in make(tokenizer).questions if q.task == "values"]
    starts = [values.answer[begin] for begin, _ in values.parts]
    allowed = [values.accepted[begin] for begin, _ in values.parts]
    assert allowed == [set(starts), set(starts[1:]), set(starts[2:])]


def test_equal_seeds_give_equal_prompts_and_others_do_not(tokenizer):
    assert make(tokenizer, seed=3) == make(tokenizer, seed=3)
    assert make(tokenizer, seed=3) != make(tokenizer, seed=4)


@pytest.mark.parametrize(
    ("haystack", "num_tokens", "message"),
    [
        pytest.param("hay", 1000, "'hay' is not one of", id="unknown"),
        pytest.param("noise", 200, "num_tokens 200 is too few", id="short"),
    ],
)
def test_a_prompt_that_cannot_be_made_says_why(tokenizer, haystack, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, haystack, num_tokens=num_tokens)


def test_frequent_words_stand_out_in_a_word_list(tokenizer):
    rng = np.random.default_rng(5)
    frequent = haystacks.common_words(rng)
    lines = haystacks.fill(haystacks.word_list(rng, frequent, tokenizer.encode), 2000)
    words = re.findall(r"\w+", tokenizer.decode(sum(lines, [])))
    counts = {noun: words.count(noun) for noun in haystacks.NOUNS}
    least = min(counts[noun] for noun in frequent)
    assert least > 3 * max(n for noun, n in counts.items() if noun not in frequent)


# ---- settings


def test_settings_are_methods_x_options_x_tails_x_corrections():
    names = [setting.name for setting in settings.all_settings()]
    assert len(set(names)) == len(names)
    assert names[0] == settings.DENSE
    families = settings.GRID.values()
    options = sum(len(family.core + family.more) for family in families)
    near = sum(len(family.near + family.half) for family in families)  # one tail each
    grid = options * len(settings.TAILS) + near
    assert len(names) == 1 + grid * len(settings.CORRECTIONS)
    core = [setting.name for setting in settings.all_settings(more=False)]
    assert set(settings.QUICK) <= set(core) < set(names)


def test_a_setting_that_the_client_lacks_says_so():
    method = settings.Setting("later", "NoSuchMethod", {})
    with pytest.raises(settings.UnknownSettingError, match="NoSuchMethod"):
        method.attention()
    option = settings.Setting("pbs", "Pbs", {"no_such_option": 1})
    with pytest.raises(settings.UnknownSettingError, match="no_such_option"):
        option.attention()


def test_a_setting_becomes_options_of_the_client():
    made = settings.Setting("pbs", "Pbs", {"threshold": 0.7}).attention()
    assert made.method.threshold == 0.7
    assert settings.Setting("dense", "Dense", {}).attention().method is not None
    permuted = settings.Setting(
        "xattention", "XAttention", {"threshold": 1, "permute": True}
    )
    assert permuted.attention().permute is not None
    assert permuted.name == "xattention 1, permuted"


def test_texts_are_verses_and_the_paragraphs_of_a_handbook(tmp_path):
    page = '<p>no</p><div class="para">\n  Short.</div><div class="para">{}</div>'
    long = "A &amp; <b>bold</b>\n word " * 3
    (tmp_path / "a.html").write_text(page.format(long))
    assert haystacks.handbook_paragraphs(tmp_path) == [
        " " + "A & bold word " * 2 + "A & bold word"
    ]
    with pytest.raises(FileNotFoundError, match="install debian-handbook"):
        haystacks.handbook_paragraphs(tmp_path / "none")


# ---- the rule


def cell(text=0.0, continuation=0.0, difference=0.0, error=0.0, time=0.5, density=0.3, n=4):
    return rule.Cell(
        rule.Mean(text, 0.001, n), rule.Mean(continuation, 0.001, n),
        rule.Mean(difference, error, n), time, density,
    )  # fmt: skip


DENSE = cell(time=1.0, density=1.0)


def chosen(**cells) -> rule.Choice:
    by_length = {name: {2048: own} for name, own in {"dense": DENSE, **cells}.items()}
    return rule.choose_default(by_length, [2048])


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        pytest.param(cell(), None, id="equal"),
        pytest.param(cell(text=0.005), None, id="text at the limit"),
        pytest.param(cell(text=0.0051), "text NLL +0.51 %", id="text above"),
        pytest.param(cell(continuation=0.006), "continuation NLL", id="continuation above"),
        pytest.param(cell(difference=-0.04, error=0.04), None, id="one standard error"),
        pytest.param(cell(difference=-0.05, error=0.04), "retrieval -0.050", id="more"),
        pytest.param(cell(difference=-0.01, error=None), "retrieval -0.010", id="no error"),
        pytest.param(cell(difference=0.2), None, id="better than dense"),
        pytest.param(cell(text=-0.2), None, id="lower loss than dense"),
        pytest.param(cell(n=1), "1 prompts, fewer than 2", id="too few prompts"),
    ],
)
def test_a_setting_holds_or_the_rule_says_why_not(own, reason):
    choice = chosen(own=own)
    assert choice.setting == ("own" if reason is None else "dense")
    if reason is not None:
        assert reason in choice.failed["own"][0]


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        pytest.param({"a": cell(time=0.6), "b": cell(time=0.5)}, "b", id="fastest"),
        pytest.param(
            {"a": cell(density=0.2), "b": cell(density=0.3)}, "a", id="fewer blocks"
        ),
        pytest.param({"a": cell(time=1.2)}, "dense", id="nothing is faster"),
        pytest.param({"a": cell(time=0.1, text=1)}, "dense", id="what fails is no choice"),
    ],
)
def test_the_fastest_setting_that_holds_is_the_default(cells, name):
    assert chosen(**cells).setting == name


def test_a_setting_must_hold_at_every_length_and_is_timed_at_the_longest():
    cells = {
        "dense": {2048: DENSE, 7900: DENSE},
        "fails at 7900": {2048: cell(time=0.1), 7900: cell(time=0.1, text=0.1)},
        "not at 7900": {2048: cell(time=0.1)},
        "slow at 2048": {2048: cell(time=0.9), 7900: cell(time=0.2)},
        "fast at 2048": {2048: cell(time=0.2), 7900: cell(time=0.3)},
    }
    choice = rule.choose_default(cells, [2048, 7900])
    assert choice.setting == "slow at 2048"
    assert choice.failed["not at 7900"] == ["7900: not measured"]


@pytest.mark.parametrize(
    ("densities", "reached"),
    [
        pytest.param({4096: 0.44, 7900: 0.21}, [True, True, True, True], id="all"),
        pytest.param({4096: 0.44, 7900: 0.29}, [True, True, False, True], id="no stretch"),
        pytest.param({4096: 0.2, 7900: 0.21}, [True, True, True, False], id="rising"),
        pytest.param({2048: 0.9}, [], id="no such length"),
    ],
)
def test_goals_of_density_are_judged_where_they_were_measured(densities, reached):
    goals = rule.density_goals({n: cell(density=d) for n, d in densities.items()})
    assert list(goals.values()) == reached


def test_a_loss_far_out_needs_no_more_prompts_and_a_near_one_does():
    assert rule.is_hopeless({2048: cell(), 4096: cell(continuation=0.02)})
    assert not rule.is_hopeless({2048: cell(text=0.01)})
    assert not rule.is_hopeless({2048: cell(text=0.5, n=1)})


# ---- summary


def text_record(setting: str, index: int, nll: float, flops: float) -> dict:
    return {
        "setting": setting, "length": 2048, "kind": "text", "index": index, "nll": nll,
        "text": "kjv", "nll_by_position": [nll] * 2, "continuation_nll": 2.0,
        "top1_agreement": 0.9,
        "kl_last_64": 0.1, "coverage": 0.9, "executed_flops": flops, "cpu_seconds": flops,
        "attention_seconds": 1.0,
    }  # fmt: skip


def retrieval_record(setting: str, index: int, score: float) -> dict:
    answer = {"task": "single", "depth": 0.5, "in_prompt": True, "parts_right": score,
              "whole": score == 1, "first_right": True}  # fmt: skip
    return {
        "setting": setting, "length": 2048, "kind": "retrieval", "index": index,
        "haystack": "kjv", "score": score, "answer_nll": 1.0, "answers": [answer],
        "coverage": 0.9, "executed_flops": 1.0, "cpu_seconds": 1.0, "attention_seconds": 1.0,
    }  # fmt: skip


def test_prompts_are_compared_with_the_same_prompts_of_dense():
    records = [
        text_record("dense", 0, 2.0, 4.0), text_record("dense", 1, 4.0, 4.0),
        text_record("dense", 2, 99.0, 4.0),  # the setting has not come so far
        text_record("x", 0, 2.1, 1.0), text_record("x", 1, 4.1, 3.0),
        *(retrieval_record("dense", i, 1.0) for i in range(3)),
        *(retrieval_record("x", i, score) for i, score in enumerate([1.0, 0.5, 0.0])),
    ]  # fmt: skip
    figures = summary.figures(records, "x", 2048)
    excess = figures["text"]["nll_excess"]
    assert (excess.n, excess.mean) == (2, pytest.approx(0.2 / 6))
    assert excess.standard_error == pytest.approx(0.0, abs=1e-12)  # equal differences
    assert figures["text"]["density"].mean == pytest.approx(0.5)
    difference = figures["retrieval"]["score_difference"]
    assert (difference.n, difference.mean) == (3, pytest.approx(-0.5))
    assert difference.standard_error == pytest.approx(0.5 / np.sqrt(3))
    assert summary.cell(figures).text_excess == excess
    json.dumps(summary.to_json(figures))


def test_a_length_without_both_kinds_of_prompts_has_no_figures():
    records = [text_record(name, 0, 2.0, 1.0) for name in ("dense", "x")]
    assert summary.figures(records, "x", 2048) is None


# ---- the log


KEYS = [("pbs 0.9", 2048, "text", i) for i in range(3)]


def test_a_log_goes_on_where_it_was(tmp_path):
    path = tmp_path / "folder/log.jsonl"
    log = RunLog(path, {"server": "a"})
    log.add(KEYS[0], {"nll": 1.5})
    again = RunLog(path, {"server": "a"})
    assert again.has(KEYS[0])
    assert not again.has(KEYS[1])
    again.add(KEYS[1], {"nll": 2.5})
    assert [r["nll"] for r in RunLog(path, {"server": "a"}).records.values()] == [
        1.5,
        2.5,
    ]


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, {"server": "a"})
    for key in KEYS[:2]:
        log.add(key, {"nll": 1.0})
    path.write_bytes(path.read_bytes()[:-5])
    again = RunLog(path, {"server": "a"})
    assert again.has(KEYS[0])
    assert not again.has(KEYS[1])
    again.add(KEYS[2], {"nll": 3.0})
    assert list(RunLog(path, {"server": "a"}).records) == [KEYS[0], KEYS[2]]


def test_a_log_of_another_server_is_refused_unless_a_fresh_one_is_wanted(tmp_path):
    path = tmp_path / "log.jsonl"
    RunLog(path, {"server": "a", "seed": 1}).add(KEYS[0], {"nll": 1.0})
    with pytest.raises(OtherRunError, match="differs in server"):
        RunLog(path, {"server": "b", "seed": 1})
    assert not RunLog(path, {"server": "b", "seed": 1}, fresh=True).records


def test_settings_are_plain_data():
    for setting, other in itertools.pairwise(settings.all_settings()):
        assert dataclasses.asdict(setting) != dataclasses.asdict(other)
        json.dumps(dataclasses.asdict(setting))


def result(method: str, excess: float, cpu: float, longest: bool = True) -> dict:
    figures = {"text": {"nll_excess": {"mean": excess}}, "time": {"cpu_ratio": cpu}}
    return {
        "method": method,
        "lengths": {"4096": figures, **({"8192": figures} if longest else {})},
    }


def test_the_readme_shows_the_default_the_papers_setting_and_one_of_each_method():
    settings_of = {
        "dense": result("dense", 0, 1),
        "pbs 0.9": result("pbs", 0.02, 0.6),
        "pbs 0.95": result("pbs", 0.01, 0.7),
        "prism 1": result("prism", 0.004, 0.8),
        "prism 2": result("prism", 0.003, 0.7),
        "prism 3": result("prism", 0.03, 0.1),
        "xattention 1": result("xattention", 0.02, 0.5),
        "xattention 2": result("xattention", 0.01, 0.6),
        "flashprefill 1": result("flashprefill", 0.2, 0.5, longest=False),
    }
    failed = {n: [] for n, s in settings_of.items()
              if s["lengths"]["4096"]["text"]["nll_excess"]["mean"] > 0.005}  # fmt: skip
    results = {"lengths": [4096, 8192], "settings": settings_of,
               "choice": {"setting": "prism 2", "failed": failed}}  # fmt: skip
    shown = summary.best_of_methods(results)
    assert shown == ["dense", "prism 2", "pbs 0.9", "pbs 0.95", "xattention 2"]
