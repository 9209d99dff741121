"""The command `pbs-client calibrate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from pbs_client import calibration
from pbs_client._prefill import find_model
from pbs_client.calibration import Calibrator
from pbs_client.cli.attention import attention_from
from pbs_client.cli.commands import print_line
from pbs_client.cli.connection import connect
from pbs_client.cli.files import TOKENS_FILE_BYTES_MAX, check_output
from pbs_client.options import Pbs

PROMPTS_MAX = 1024
_HELD_OUT_EVERY = 2  # the second of every two prompts is for the check
_ROUNDING = 1e-5  # of a lost mass: dense attention may measure a little above 0


def calibrate(arguments: argparse.Namespace) -> None:
    """`pbs-client calibrate`."""
    attention = attention_from(arguments)
    rows = attention.coverage_rows
    attention = dataclasses.replace(
        attention, method=attention.method or Pbs(), coverage_rows=None
    )
    name = arguments.name or Path(arguments.output).stem
    calibration.check_name(name)
    check_output(arguments.output)
    prompts = read_prompts(arguments.prompts)
    check_prompts = prompts[1::_HELD_OUT_EVERY]
    prompts = prompts[::_HELD_OUT_EVERY]
    with connect(arguments) as client:
        model = find_model(client.models(), arguments.model)
        calibrator = Calibrator(
            client,
            model,
            attention,
            coverage_rows=calibration.COVERAGE_ROWS_DEFAULT if rows is None else rows,
            timeout=arguments.timeout,
            on_measured=print_line,
        )
        curves = calibrator.curves(prompts, arguments.thresholds)
        chosen = calibration.allocate(curves, arguments.budget)
        uniform = calibration.best_uniform(curves, arguments.budget)
        found: dict[str, Any] = {
            "model": model.name,
            "lost_mass_budget": arguments.budget,
            "prompts": len(prompts),
            "predicted_density": chosen.density,
            "predicted_lost_mass": chosen.lost_mass,
            "check_prompts": len(check_prompts),
        }
        if check_prompts:
            check = calibrator.check(check_prompts, chosen.thresholds)
            found |= {
                "density": check.density,
                "lost_mass": check.lost_mass,
                "kl": check.kl,
            }
        profile = calibrator.to_message(name, chosen, found)
    text = json_format.MessageToJson(profile, preserving_proto_field_name=True)
    Path(arguments.output).write_text(text + "\n")
    warning = over_budget(found)
    if warning:
        print(f"pbs-client: {warning}", file=sys.stderr)
    print_line(
        {
            "step": "profile",
            "profile": name,
            **found,
            "heads": calibrator.num_heads,
            "dense_heads": chosen.thresholds.count(calibration.DENSE_THRESHOLD),
            "uniform_threshold": uniform.thresholds[0],
            "uniform_predicted_density": uniform.density,
            "output": arguments.output,
        }
    )


def over_budget(found: dict[str, Any]) -> str | None:
    """What to say of a profile that lost more than its budget on the check's prompts.

    Args:
        found: lost_mass_budget, and of a check check_prompts and lost_mass.

    Returns:
        None when the budget was kept or nothing was checked.
    """
    lost, budget = found.get("lost_mass", 0.0), found["lost_mass_budget"]
    if lost <= budget + _ROUNDING:
        return None
    return (
        f"warning: the profile loses {lost:.3g} of the attention mass on the "
        f"{found['check_prompts']} prompts of the check, more than --budget {budget:g}; "
        "calibrate with more prompts, which are like those to serve, or with a --budget "
        f"of {budget * budget / lost:.2g}"
    )


def read_prompts(path: str) -> list[list[int]]:
    """The prompts of a file: on each line a JSON list of token ids.

    Raises:
        ValueError: naming the line that is none, or a limit.
    """
    with Path(path).open("rb") as file:
        text = file.read(TOKENS_FILE_BYTES_MAX + 1)
    if len(text) > TOKENS_FILE_BYTES_MAX:
        raise ValueError(f"{path} has more than {TOKENS_FILE_BYTES_MAX} bytes")
    lines = text.splitlines()
    if not 1 <= len(lines) <= PROMPTS_MAX:
        raise ValueError(
            f"{path} has {len(lines)} lines; it has a prompt in each of 1 .. {PROMPTS_MAX}"
        )
    return [_prompt(f"{path} line {number}", line) for number, line in enumerate(lines, 1)]


def _prompt(where: str, line: bytes) -> list[int]:
    try:
        tokens = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    is_list = isinstance(tokens, list) and tokens
    if not is_list or any(type(token) is not int for token in tokens):
        raise ValueError(f"{where} is not a JSON list of integers, or empty")
    return tokens
