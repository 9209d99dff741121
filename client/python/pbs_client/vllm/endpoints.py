"""Which servers the connector may connect to.

A user of vLLM's HTTP API can write any endpoint into kv_transfer_params. The connector
therefore connects only to servers that its operator has listed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

_PORTS = range(1, 65_536)
_HOST_CHARACTERS_MAX = 253  # of a name in the DNS
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")

_Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class EndpointError(ValueError):
    """A text is no endpoint, or the endpoint is not allowed."""


@dataclass(frozen=True)
class _Pattern:
    host: str  # "" with a network; "*", "*.suffix" or a name
    network: _Network | None
    port: int | None  # None: any

    def matches(self, host: str, port: int) -> bool:
        if self.port is not None and self.port != port:
            return False
        address = _address(host)
        if self.network is not None:
            return address is not None and address in self.network
        if self.host == "*":
            return True
        if self.host.startswith("*."):
            return address is None and host.endswith(self.host[1:])
        return host == self.host


class AllowList:
    """Patterns of servers.

    A pattern is HOST:PORT. HOST is a name, an address, a network such as 10.0.0.0/8 or
    [fd00::/8], *.SUFFIX for names below SUFFIX, or * for every host. PORT is a number,
    or * for every port. A network matches only addresses: names are not looked up.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Reads the patterns. EndpointError: one of them is none."""
        self._patterns = tuple(_pattern(text) for text in patterns)

    def check(self, endpoint: str) -> None:
        """EndpointError: the endpoint is not HOST:PORT, or no pattern matches it."""
        host, port = check_endpoint(endpoint)
        if not any(pattern.matches(host, port) for pattern in self._patterns):
            raise EndpointError(
                "the ticket's endpoint is not in the connector's list of servers; if "
                "it is a prefill server of yours, add it to kv_connector_extra_config "
                "endpoints"
            )


def check_endpoint(text: str) -> tuple[str, int]:
    """Host, in lower case and without brackets, and port of HOST:PORT.

    Raises:
        EndpointError: it is anything else, such as a gRPC target with a scheme.
    """
    host, port = _split(text)
    if not port.isdecimal() or not port.isascii() or int(port[:6]) not in _PORTS:
        raise EndpointError("the port of an endpoint is not a number of 1 to 65535")
    if _address(host) is None and not _is_name(host):
        raise EndpointError("the host of an endpoint is neither a name nor an address")
    return host, int(port)


def _split(text: str) -> tuple[str, str]:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1].lower(), port
    if not colon or not host or ":" in host:
        raise EndpointError("an endpoint is not HOST:PORT, such as 10.0.0.7:50051")
    return host.lower(), port


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_name(host: str) -> bool:
    labels = host.split(".")
    # A name whose last label is a number can be read as an address, such as 127.1.
    return (
        len(host) <= _HOST_CHARACTERS_MAX
        and all(_LABEL.fullmatch(label) for label in labels)
        and not labels[-1].isdecimal()
        and not re.fullmatch(r"0[xX][0-9a-fA-F]*", labels[-1])
    )


def _pattern(text: str) -> _Pattern:
    try:
        host, port_text = _split(text)
        port = None if port_text == "*" else check_endpoint(f"any:{port_text}")[1]
        if "/" in host:
            return _Pattern("", ipaddress.ip_network(host), port)
        if host != "*" and not _is_name(host.removeprefix("*.")):
            if _address(host) is None:
                raise EndpointError("its host is no name, address or network")
            return _Pattern("", ipaddress.ip_network(host), port)
    except ValueError as error:
        raise EndpointError(
            f"kv_connector_extra_config endpoints: {text!r} is no pattern ({error}); "
            "write HOST:PORT, NETWORK/BITS:PORT, *.SUFFIX:PORT or *:PORT"
        ) from None
    return _Pattern(host, None, port)
