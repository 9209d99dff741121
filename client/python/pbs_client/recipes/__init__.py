"""Experiments by name: `pbs-client recipe NAME`.

RECIPES is the table. run_recipe() runs one against a server and writes its result:
experiment_NAME.json with figures, machine, commits and command, and experiment_NAME.svg.
docs/EXPERIMENTS.md says what was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pbs_client.recipes import (
    adaptive_segment,
    block_maps,
    cost_share,
    identity,
    proxy_correlation,
    segment_size,
    synthetic_task,
    threshold,
    ttft,
)
from pbs_client.recipes.base import Inputs, Outcome, Recipe, RecipeError
from pbs_client.recipes.provenance import origin

_MODULES = (
    identity,
    segment_size,
    threshold,
    ttft,
    proxy_correlation,
    cost_share,
    block_maps,
    synthetic_task,
    adaptive_segment,
)
RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in _MODULES}

# How an input is given on the command line.
INPUT_FLAGS = {
    "heads": "--heads FILE (`pbs-client capture` writes one)",
    "model": "--model NAME",
    "tokens": "--tokens FILE",
    "tasks": "--tasks FILE",
}
_INCHES = (8, 3.6)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. RecipeError lists the known ones."""
    if name not in RECIPES:
        raise RecipeError(f"recipe {name!r} is not one of {', '.join(RECIPES)}")
    return RECIPES[name]


def check_inputs(recipe: Recipe, inputs: Inputs) -> None:
    """RecipeError names the flags of what is missing."""
    for need in recipe.needs:
        if not getattr(inputs, need):
            raise RecipeError(f"recipe {recipe.name} needs {INPUT_FLAGS[need]}")


def run_recipe(recipe: Recipe, inputs: Inputs, folder: Path, plot: bool = True) -> Any:
    """Runs a recipe and writes its files.

    Args:
        recipe: from find_recipe().
        inputs: what it works on.
        folder: is made if it does not exist.
        plot: write the SVG; needs matplotlib.

    Returns:
        the result as it stands in the JSON file.

    Raises:
        RecipeError: something is missing.
        ImportError: says what to install.
        PbsError: as the calls of Client.
    """
    check_inputs(recipe, inputs)
    if plot:
        _matplotlib()  # before the work, not after
    header = origin(inputs.client)
    result = _result(recipe, inputs, header, recipe.run(inputs))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe.result_name}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if plot:
        draw(recipe, json.loads(path.read_text()), path.with_suffix(".svg"))
    return result


def _result(
    recipe: Recipe, inputs: Inputs, header: dict[str, Any], outcome: Outcome
) -> dict[str, Any]:
    used: dict[str, Any] = {"model": inputs.model}
    if inputs.heads is not None:
        used.update(inputs.heads.metadata())
    if inputs.tokens:
        used["prompt_tokens"] = len(inputs.tokens)
    return {
        "recipe": recipe.name,
        "question": recipe.question,
        **header,
        "inputs": used,
        "columns": list(outcome.columns),
        "rows": outcome.rows,
        "found": list(outcome.found),
        **outcome.figures,
    }


def draw(recipe: Recipe, result: dict[str, Any], path: Path) -> None:
    """Writes the plot of a result. ImportError says what to install."""
    pyplot = _matplotlib()
    settings = {
        "svg.hashsalt": "pbs",  # the same plot is the same file
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
    with pyplot.rc_context(settings):
        figure = pyplot.figure(figsize=_INCHES)
        recipe.draw(figure, result)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "plots need matplotlib: pip install 'pbs-client[recipes]', or --no-plot"
        ) from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


def table_lines(result: dict[str, Any]) -> list[str]:
    """The table of a result as aligned text."""
    cells = [[str(c) for c in result["columns"]]]
    cells += [[cell_text(cell) for cell in row] for row in result["rows"]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    pads: list[Callable[[str, int], str]] = [str.ljust] + [str.rjust] * (
        len(widths) - 1
    )
    return [
        "  ".join(pad(cell, w) for pad, cell, w in zip(pads, row, widths)).rstrip()
        for row in cells
    ]


def cell_text(cell: Any) -> str:
    """A cell for people: four significant digits."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return str(cell)
