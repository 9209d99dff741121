#!/usr/bin/env python3
"""Checks that files and functions stay readable.

    python3 tests/structure/check_structure.py

A source file may have 500 lines and a function 70; more needs a line with the word
"Length:" and the reason, in the first 40 lines of the file or in the comment right above
the function. C++ functions are found by their layout, which clang-format fixes.
"""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
CPP = {".h", ".cc", ".inc", ".cu", ".cuh"}
NOT_A_FUNCTION = re.compile(
    r"^\s*(namespace|class|struct|enum|union|if|for|while|switch|else|do|extern|return|"
    r"typedef|using|case|default|INSTANTIATE_\w+|\}|#|//)\b|^\s*\}"
)


def cpp_functions(lines: list[str]):
    """Yields (first line index, length) of function definitions."""
    for end, line in enumerate(lines):
        stripped = line.rstrip()
        if not stripped.endswith("{") or NOT_A_FUNCTION.match(line):
            continue
        begin = end
        while begin > 0 and not re.search(r"[;{}:]\s*$|^\s*(#|//)|^\s*$", lines[begin - 1]):
            begin -= 1
        signature = " ".join(lines[begin : end + 1])
        if "(" not in signature or NOT_A_FUNCTION.match(lines[begin]):
            continue
        indent = len(lines[begin]) - len(lines[begin].lstrip())
        closing = re.compile(rf"^ {{{indent}}}\}}")
        close = next(
            (i for i in range(end + 1, len(lines)) if closing.match(lines[i])), end
        )
        yield begin, close - begin + 1


def python_functions(text: str):
    """Yields (first line index, length) of function definitions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno - 1, node.end_lineno - node.lineno + 1


def has_reason(lines: list[str], begin: int) -> bool:
    """Whether the comment above line `begin` says why the function is long."""
    above = begin - 1
    while above >= 0 and re.match(r"^\s*(//|#|template|@)", lines[above]):
        if "Length:" in lines[above]:
            return True
        above -= 1
    return False


def violations(path: pathlib.Path) -> list[str]:
    """One line for every limit that `path` breaks without a reason."""
    text = path.read_text()
    lines = text.splitlines()
    name = path.relative_to(ROOT).as_posix()
    found = []
    if len(lines) > FILE_LINES_MAX and not any("Length:" in x for x in lines[:40]):
        found.append(f"{name}: {len(lines)} lines, more than {FILE_LINES_MAX}")
    functions = cpp_functions(lines) if path.suffix in CPP else python_functions(text)
    for begin, length in functions:
        if length > FUNCTION_LINES_MAX and not has_reason(lines, begin):
            found.append(
                f"{name}:{begin + 1}: function of {length} lines, more than "
                f"{FUNCTION_LINES_MAX}"
            )
    return found


def main() -> int:
    """Checks every tracked source file."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    files = [ROOT / f for f in tracked if pathlib.Path(f).suffix in CPP | {".py"}]
    found = [line for path in files if path.exists() for line in violations(path)]
    print("\n".join(found) or f"{len(files)} files respect the limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
