"""Settings of the connector: the fields of vLLM's kv_connector_extra_config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pbs_client.dtypes import F8_E4M3
from pbs_client.vllm.endpoints import AllowList, check_endpoint

MIB = 1 << 20
RELEASES = ("finish", "load")
PATTERNS_MAX = 256
DIGEST_CHARACTERS_MAX = 128

# field: (least, most) of its number
_LIMITS: dict[str, tuple[float, float]] = {
    "load_threads": (1, 64),
    "load_seconds_max": (1, 86_400),
    "load_bytes_max": (MIB, 1 << 40),
    "call_seconds_max": (0.1, 60),
}


@dataclass(frozen=True)
class Settings:
    """Checked settings.

    Attributes:
        endpoints: servers that the connector may connect to; see AllowList.
        server: HOST:PORT of tickets without an endpoint; it is also allowed.
        model_digest: that every cache must have; "" accepts any of the engine's sizes.
        dedicated: the engine serves requests of one approximate method only, so that
            its prefix cache may hold approximate caches without a salt.
        wire_dtype: "f8_e4m3": caches travel so, and every cache is an approximation;
            only with `dedicated`. "": they travel as the engine's dtype.
        release: "finish": the lease is held until the request ends, and a request that
            was preempted loads again. "load": it is released after the load, and such a
            request computes its prompt.
        load_threads: caches that one rank loads at a time.
        load_seconds_max: of one load, with the wait for a prefill that still runs.
        load_bytes_max: host memory of one load; larger caches come in several fetches.
        call_seconds_max: of a call that moves no tensors.
    """

    endpoints: AllowList
    server: str = ""
    model_digest: str = ""
    dedicated: bool = False
    wire_dtype: str = ""
    release: str = "finish"
    load_threads: int = 4
    load_seconds_max: float = 300.0
    load_bytes_max: int = 1024 * MIB
    call_seconds_max: float = 5.0

    @classmethod
    def from_extra_config(cls, given: Mapping[str, Any]) -> Settings:
        """The settings of kv_connector_extra_config.

        Raises:
            ValueError: a field is unknown, has another type, or is outside its limits;
                or no server is allowed.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"{_name(unknown[0])} is no setting; these are: {', '.join(known)}"
            )
        values = {
            name: _checked(name, str(known[name].type), value)
            for name, value in given.items()
            if name != "endpoints"
        }
        if values.get("release", "finish") not in RELEASES:
            raise ValueError(f"{_name('release')} is not one of {', '.join(RELEASES)}")
        _check_wire(values.get("wire_dtype", ""), values.get("dedicated", False))
        server = values.get("server", "")
        patterns = _patterns(given.get("endpoints", []))
        if server:
            try:
                check_endpoint(server)
            except ValueError as error:
                raise ValueError(f"{_name('server')}: {error}") from None
            patterns = (*patterns, server)
        if not patterns:
            raise ValueError(
                f"{_name('endpoints')} names no server, and {_name('server')} is not "
                'set; list the prefill servers, such as {"endpoints": '
                '["10.0.0.0/8:50051", "*.prefill.svc:50051"]}'
            )
        return cls(endpoints=AllowList(patterns), **values)


def _name(field: str) -> str:
    return f"kv_connector_extra_config {field}"


def _check_wire(wire_dtype: str, dedicated: bool) -> None:
    if wire_dtype not in ("", F8_E4M3):
        raise ValueError(f"{_name('wire_dtype')} is not {F8_E4M3}")
    if wire_dtype and not dedicated:
        raise ValueError(
            f"{_name('wire_dtype')} {wire_dtype} needs dedicated true: every cache "
            "that travelled so is approximate, and no digest or cache_salt tells it "
            "from an exact one in vLLM's prefix cache"
        )


def _patterns(given: Any) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(pattern, str) for pattern in given
    ):
        raise ValueError(f"{_name('endpoints')} is not a list of strings")
    if len(given) > PATTERNS_MAX:
        raise ValueError(
            f"{_name('endpoints')} has {len(given)} patterns, more than {PATTERNS_MAX}"
        )
    return tuple(given)


def _checked(name: str, kind: str, value: Any) -> Any:
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{_name(name)} is not true or false")
        return value
    if kind == "str":
        if not isinstance(value, str) or len(value) > DIGEST_CHARACTERS_MAX:
            raise ValueError(
                f"{_name(name)} is not a string of at most {DIGEST_CHARACTERS_MAX} "
                "characters"
            )
        return value
    types = (int,) if kind == "int" else (int, float)
    if not isinstance(value, types) or isinstance(value, bool):
        what = "an integer" if kind == "int" else "a number"
        raise ValueError(f"{_name(name)} is not {what}")
    least, most = _LIMITS[name]
    if not least <= value <= most:
        raise ValueError(f"{_name(name)} {value} is outside [{least}, {most}]")
    return value
