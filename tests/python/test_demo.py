"""The parts of scripts/demo_disaggregated.sh that need no vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from eventually import until
from real_server import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests/demo"))
import processes  # noqa: E402
import timeline  # noqa: E402
from chat import Answer  # noqa: E402

SCRIPT = REPOSITORY / "scripts/demo_disaggregated.sh"
SENT = 1_800_000_000.0


def event(second: float, seconds: float) -> dict:
    """A log line of a call that ended `second` seconds after SENT."""
    stamp = f"2027-01-15T08:00:{second:09.6f}Z"
    return {"time": stamp, "seconds": seconds}


def spans() -> list[timeline.Span]:
    answer = Answer(SENT, first=SENT + 4.5, last=SENT + 6.0)
    fetches = [event(3.5, 0.3), event(4.0, 0.5)]
    return timeline.spans_of(answer, event(3.0, 2.5), fetches)


def test_the_parts_of_a_request_follow_each_other():
    parts = spans()
    assert (parts[0].begin, parts[-1].end) == (0.0, 6.0)
    assert all(a.end == b.begin for a, b in zip(parts, parts[1:]))
    assert {part.what: round(part.end - part.begin, 3) for part in parts} == {
        "chat template, token ids": 0.5,
        "prefill": 2.5,
        "ticket to vLLM": 0.2,
        "transfer, checked": 0.8,
        "first token": 0.5,
        "further tokens": 1.5,
    }


def test_the_picture_has_a_bar_for_each_part():
    parts = spans()
    result = {
        "model": "a <model>",
        "prompt_tokens": 2261,
        "machine": {"cpus": 2},
        "spans": timeline.as_json(parts),
    }
    picture = ElementTree.fromstring(timeline.draw(result))
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0].startswith("a <model>, 2,261 prompt tokens")
    assert all(any(text.startswith(part.what) for text in texts) for part in parts)


def test_the_committed_picture_is_that_of_its_results_file():
    result = json.loads(timeline.RESULT.read_text())
    assert timeline.RESULT.with_suffix(".svg").read_text() == timeline.draw(result)


def test_a_program_that_ends_early_is_named_with_its_last_lines(tmp_path):
    programs = processes.Programs(tmp_path)
    program = programs.start("node 1", ["sh", "-c", "echo no such model; exit 3"])
    with pytest.raises(processes.DemoError, match=r"node 1 stopped with status 3") as error:
        program.wait_for(lambda: None, 30)
    assert "no such model" in str(error.value)
    assert "node-1.log" in error.value.then
    programs.stop()


def test_stopping_ends_a_program_and_its_children(tmp_path):
    programs = processes.Programs(tmp_path)
    program = programs.start("parent", ["sh", "-c", "sleep 600 & echo $!; wait"])
    child = program.wait_for(lambda: program.log.read_text().strip() or None, 30)
    assert not has_ended(child)
    programs.stop()
    assert program.process.returncode is not None
    until(lambda: has_ended(child))


def has_ended(process: str) -> bool:
    """Whether a process is gone, or waits only for its parent to see its end."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fast"], "unknown argument --fast"),
        (["--result"], "--result needs a file"),
    ],
)
def test_a_wrong_argument_of_the_demo_is_refused_by_name(words, said):
    done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert said in done.stderr
