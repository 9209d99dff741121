"""What pbs-prefilld says about its command line."""

from __future__ import annotations

import subprocess

import pytest
from pbs_client import Client
from real_server import RECALL_MODEL, running_server, server_binary


def check(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [server_binary(), "--check-config", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_set_says_more_about_a_model_of_the_command_line():
    flags = ("--model", f"recall={RECALL_MODEL}", "--set", "models.0.kv_dtype=f32")
    with running_server(*flags) as server, Client(server.target) as client:
        assert client.models()[0].kv_dtype == "f32"


WRONG = {
    "an unknown set and bad values": (
        ("--set", "lease.ttl=1", "--set", "log.level=loud", "--threads", "-3"),
        ("--set lease.ttl: ", 'log.level "loud"', "cpu.threads -3"),
    ),
    "two unknown sets": (
        ("--set", "lease.ttl=1", "--set", "nothing=1"),
        ("--set lease.ttl: ", "--set nothing: "),
    ),
    "a model without a path and a bad value": (
        ("--model", "x", "--set", "log.level=loud"),
        ("--model x is not NAME=PATH", 'log.level "loud"'),
    ),
    "profiles of no model": (
        ("--model", "a=/p", "--profile", "a", "--profile", "b=/q"),
        ("--profile a is not MODEL=FILE", '--profile b=/q: no model is named "b"'),
    ),
    "a profile without a file": (
        ("--model", "a=/p", "--profile", "a="),
        ('models.0.profiles.0 "" is empty',),
    ),
    "a set that renames a model of the command line": (
        ("--model", "a=/p", "--set", "models.0.name=b"),
        ("models.0, which --model a=/p gave; use another index, from 1 on",),
    ),
    "a set that replaces a model of the command line": (
        ("--model", "a=/p", "--set", "models.0.path=/q"),
        ("models.0, which --model a=/p gave; use another index, from 1 on",),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_everything_that_is_wrong_is_said_at_once(name):
    flags, messages = WRONG[name]
    refused = check(*flags)
    assert refused.returncode == 2
    for message in messages:
        assert message in refused.stderr


def test_a_model_may_come_from_each_of_the_two():
    flags = ("--model", "a=/p", "--set", "models.1.name=b", "--set", "models.1.path=/q")
    assert check(*flags).returncode == 0


@pytest.mark.parametrize("address", ["[::1]:9464", "0.0.0.0:9464", "localhost:9464"])
def test_what_can_be_bound_is_a_valid_address(address):
    assert check("--metrics-listen", address).returncode == 0
