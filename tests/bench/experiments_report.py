#!/usr/bin/env python3
"""Writes the tables of docs/EXPERIMENTS.md from docs/results/experiment_*.json.

    scripts/bench.sh report

A recipe without a results file keeps its table. The recipes write their own plots.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from report import RESULTS, ROOT, fill, source, table

sys.path.insert(0, str(ROOT / "client/python"))
from pbs_client.recipes import RECIPES, cell_text  # noqa: E402

PAGE = ROOT / "docs/EXPERIMENTS.md"


def recipe_table(result: dict[str, Any]) -> str:
    """The table of a result, and what it was measured on."""
    used = result["inputs"]
    facts = [f"model {used['model']}"] if used.get("model") else []
    if used.get("layers"):
        facts.append(f"heads of layers {used['layers']} of a text of {used['tokens']} tokens")
    rows = [[cell_text(cell) for cell in row] for row in result["rows"]]
    server = result["server_commit"][:12]
    return (
        f"{table(result['columns'], rows)}\n\n{'; '.join(facts)}. "
        f"{source(RECIPES[result['recipe']].result_name, result)} Server: `{server}`."
    )


def main() -> int:
    """Rewrites the page."""
    for recipe in RECIPES.values():
        path = RESULTS / f"{recipe.result_name}.json"
        if not path.exists():
            print(f"{path.relative_to(ROOT)} does not exist; its table stays", file=sys.stderr)
            continue
        fill(PAGE, recipe.result_name, recipe_table(json.loads(path.read_text())))
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
