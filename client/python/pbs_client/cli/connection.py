"""The connection of a command to its server."""

from __future__ import annotations

import argparse

from pbs_client.client import Client


def connect(arguments: argparse.Namespace) -> Client:
    """The client of the parsed --server and --ignore-endpoint."""
    return Client(arguments.server, follow_endpoints=not arguments.ignore_endpoint)
