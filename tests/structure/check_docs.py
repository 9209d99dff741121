#!/usr/bin/env python3
"""Checks that the documentation is complete and its links are alive.

    python3 tests/structure/check_docs.py

Every metric of server/telemetry with its HELP, every field of ServerConfig and every flag
of the server must be in docs/OPERATIONS.md; every relative link of every Markdown file
must lead to a file; every figure table of docs/BENCHMARKS.md and docs/EXPERIMENTS.md must
name the results file that it was written from, and that file must exist.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPERATIONS = ROOT / "docs/OPERATIONS.md"
PAGES_OF_FIGURES = (ROOT / "docs/BENCHMARKS.md", ROOT / "docs/EXPERIMENTS.md")


def tracked(suffix: str) -> list[pathlib.Path]:
    """Tracked and new files with a suffix."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")
    return [ROOT / n for n in names if n.endswith(suffix) and (ROOT / n).exists()]


METRIC_NAMES = ROOT / "server/telemetry/metric_names.h"
METRIC = r'"((?:pbs_|process_|vllm:)[a-z0-9_]+)"'


def metrics() -> set[str]:
    """Names of all exported metrics."""
    return set(re.findall(METRIC, METRIC_NAMES.read_text()))


def wrong_helps(operations: str) -> list[str]:
    """Metrics whose HELP is not a column of their row, or not told in the text."""
    found = []
    for name, parts in re.findall(
        METRIC + r',\s*((?:"[^"]*"\s*)+)\}', METRIC_NAMES.read_text()
    ):
        told = "".join(re.findall(r'"([^"]*)"', parts))
        row = rf"^\| `{name}(?:\{{[a-z,]+\}})?` \| {re.escape(told)} \|"
        text = rf"`{name}` \({re.escape(told)}\)"
        if not re.search(f"{row}|{text}", operations, re.M):
            found.append(f"docs/OPERATIONS.md: {name} is not described by its HELP: {told}")
    return found


def strange_names() -> list[str]:
    """Names of metrics that stand outside their one place."""
    files = [p for suffix in ("*.cc", "*.h") for p in (ROOT / "server").rglob(suffix)]
    return [
        f"{path.relative_to(ROOT)}: {name} belongs in {METRIC_NAMES.relative_to(ROOT)}"
        for path in files
        if path != METRIC_NAMES
        for name in re.findall(METRIC, path.read_text())
    ]


def config_fields() -> set[str]:
    """Dotted paths of all scalar fields of ServerConfig."""
    text = re.sub(r"//.*", "", (ROOT / "proto/pbs/v1/server_config.proto").read_text())
    messages = {
        name: re.findall(r"(?:optional|repeated)?\s*([\w.]+)\s+(\w+)\s*=\s*\d+;", body)
        for name, body in re.findall(r"message (\w+) \{(.*?)\n\}", text, re.S)
    }

    def walk(message: str, prefix: str):
        for kind, field in messages[message]:
            name = prefix + field
            if kind in messages:
                repeated = re.search(rf"repeated {kind} {field}\b", text)
                yield from walk(kind, name + ("[]." if repeated else "."))
            else:
                yield name

    return set(walk("ServerConfig", ""))


def server_flags() -> set[str]:
    """Flags that pbs-prefilld accepts."""
    text = (ROOT / "server/main.cc").read_text()
    return set(re.findall(r'add_(?:option|flag)\(\s*"(--[a-z-]+)"', text))


def dead_links() -> list[str]:
    """Relative links of Markdown files that lead nowhere."""
    dead = []
    for page in tracked(".md"):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" in target or target.startswith("mailto:"):
                continue
            if not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: link to {target} is dead")
        # A table of figures quotes the command that was run, in the tree of its commit.
        text = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.S)
        for target in re.findall(r"`((?:docs|scripts|tests|deploy)/[\w./-]+\.\w+)`", text):
            if not (ROOT / target).exists() and not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: names {target}, which is missing")
    return dead


def tables_without_results(page: pathlib.Path) -> list[str]:
    """Figure tables of a page that are from no results file."""
    found = []
    pattern = r"<!-- table: (\w+) -->\n(.*?)<!-- end -->"
    for name, body in re.findall(pattern, page.read_text(), re.S):
        # Of a GPU, several runs make one table.
        wanted = "gpu_*" if name.startswith("gpu_") else name
        pattern = wanted.replace("*", r"\d+")
        sources = re.findall(rf"\]\((results/{pattern}\.json)\)", body)
        if body and not sources:  # an empty one waits for its first run
            found.append(f"docs/{page.name}: table {name} does not name results/{wanted}.json")
        found += [
            f"docs/{page.name}: table {name} is from {source}, which is missing"
            for source in sources
            if not (page.parent / source).exists()
        ]
    return found


def main() -> int:
    """Prints what is missing."""
    text = OPERATIONS.read_text()
    wanted = {"metric": metrics(), "setting": config_fields(), "flag": server_flags()}
    found = [
        f"docs/OPERATIONS.md: {kind} {name} is not documented"
        for kind, names in wanted.items()
        for name in sorted(names)
        if not re.search(re.escape(name) + r"(?![a-z0-9_])", text)
    ]
    found += wrong_helps(text) + strange_names()
    found += dead_links()
    for page in PAGES_OF_FIGURES:
        found += tables_without_results(page)
    counts = ", ".join(f"{len(names)} {kind}s" for kind, names in wanted.items())
    print("\n".join(found) or f"documentation covers {counts}; all links are alive")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
