"""docs/DISAGGREGATION.md has every flag and metric of pbs-gateway."""

from __future__ import annotations

import re

import pytest
from pbs_client.gateway.apis import APIS
from pbs_client.gateway.cli import make_parser
from pbs_client.gateway.errors import TYPES
from pbs_client.gateway.metrics import Metrics
from real_server import REPOSITORY

PAGE = (REPOSITORY / "docs" / "DISAGGREGATION.md").read_text()
FLAGS = sorted(
    flag
    for action in make_parser()._actions
    for flag in action.option_strings
    if flag.startswith("--") and flag not in ("--help", "--version")
)
METRICS = re.findall(r"^# HELP (\S+) (.*)$", Metrics().text().decode(), re.M)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_has_a_row_with_its_default(flag):
    (action,) = (a for a in make_parser()._actions if flag in a.option_strings)
    (row,) = re.findall(rf"^\| `{flag}[^|]*\| ([^|]*) \|", PAGE, re.M)
    if isinstance(action.default, (int, str)) and action.default:
        assert row.strip("`") == str(action.default)


@pytest.mark.parametrize(("name", "told"), METRICS)
def test_a_metric_has_a_row_with_its_help(name, told):
    if name.endswith("_created"):
        return
    assert re.search(rf"^\| `{name}(\{{[a-z,]+\}})?` \| {re.escape(told)} \|", PAGE, re.M)


def test_every_route_and_status_has_a_row():
    for route in (*(api.path for api in APIS), "/v1/models", "/health", "/metrics"):
        assert re.search(rf"^\| `(GET|POST) {re.escape(route)}`", PAGE, re.M), route
    for status, kind in TYPES.items():
        assert re.search(rf"^\| {status}[^|]*\| `{kind}`", PAGE, re.M), status
