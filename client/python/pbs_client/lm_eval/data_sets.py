"""Data sets that tasks of long contexts download, and what to say when that fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

HUB = "https://huggingface.co/datasets/"


@dataclass(frozen=True)
class DataSet:
    """A download.

    Attributes:
        name: of the data set.
        url: of the download.
        tasks: that read it.
        sign: text in errors about it.
    """

    name: str
    url: str
    tasks: str
    sign: str


def _on_hub(name: str, tasks: str) -> DataSet:
    return DataSet(name, HUB + name, tasks, name)


DATA_SETS = (
    _on_hub("Xnhyacinth/LongBench", "longbench"),
    _on_hub("recursal/longbench-v2", "longbench2"),
    _on_hub("baber/paul_graham_essays", "ruler: niah_single_2, _3, niah_multi*"),
    DataSet(
        "SQuAD 2.0",
        "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
        "ruler: ruler_qa_squad",
        "/SQuAD-explorer/dataset/dev-v2.0.json",
    ),
    DataSet(
        "HotpotQA",
        HUB + "namlh2004/hotpotqa",
        "ruler: ruler_qa_hotpot",
        "namlh2004/hotpotqa",
    ),
)
# What `datasets` says of a data set that it did not find; then of no error else.
_NOT_FOUND = re.compile(
    r"Couldn't reach '([\w.-]+/[\w.-]+)' on the Hub"
    r"|Dataset '([\w.-]+/[\w.-]+)' doesn't exist on the Hub"
)


def missing(error: BaseException) -> DataSet | None:
    """The data set that could not be downloaded; None when an error is another one."""
    for one in _chain(error):
        if not isinstance(one, OSError):  # as errors of the network and of files are
            continue
        text = str(one)
        for data_set in DATA_SETS:
            if data_set.sign in text:
                return data_set
        found = _NOT_FOUND.search(text)
        if found:
            return _on_hub(found[1] or found[2], "these tasks")
    return None


def advice(data_set: DataSet) -> str:
    """What to say when it is missing."""
    text = (
        f"data set {data_set.name} ({data_set.tasks}) is not on this machine, and its "
        f"download failed: {data_set.url}"
    )
    if not data_set.url.startswith(HUB) or data_set.name not in data_set.url:
        return f"{text}\nRun the tasks on a machine that reaches it."
    return (
        f"{text}\nOn a machine that reaches it, run `hf download --repo-type dataset "
        f"{data_set.name} --local-dir {data_set.name}`, and copy that folder to where "
        "this command runs; or leave these tasks out."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
