"""The settings that are compared: methods x thresholds x dense tail x mean correction.

A setting is data. It becomes options of the client when it is measured. A setting that
this client or server does not have is skipped, with the reason, so the table may name
methods before they exist.

What every setting says: how many blocks of queries at the end are dense, and whether
blocks that are not computed take part through their means. A setting of neither says so
too, because a server's defaults may differ.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pbs_client
from pbs_client import Attention

DENSE = "dense"
TAILS = (0, 1)  # query blocks at the end that read every earlier block
CORRECTIONS = (False, True)


def _each(name: str, *values: float) -> tuple[dict[str, Any], ...]:
    return tuple({name: value} for value in values)


@dataclasses.dataclass(frozen=True)
class Family:
    """A method's class in the client, and the options that are tried.

    `core` is what a run takes by default, `more` what it takes in addition on request.
    """

    class_name: str
    core: tuple[dict[str, Any], ...]
    more: tuple[dict[str, Any], ...] = ()


GRID = {
    "pbs": Family("Pbs", _each("threshold", 0.95, 0.9, 0.8), _each("threshold", 0.7, 0.5)),
    "mean_pooling": Family(
        "MeanPooling", _each("threshold", 0.95, 0.9), _each("threshold", 0.8)
    ),
    "xattention": Family(
        "XAttention", _each("threshold", 0.95, 0.9), _each("threshold", 0.8)
    ),
    "flexprefill": Family("FlexPrefill", _each("gamma", 0.95, 0.9), _each("gamma", 0.98)),
    "prism": Family("Prism", _each("threshold", 0.95, 0.9), _each("threshold", 0.98)),
    "flashprefill": Family("FlashPrefill", _each("alpha", 0.05, 0.1), _each("alpha", 0.2)),
    "minference": Family(
        "MInference",
        ({"vertical_tokens": 512, "slash_tokens": 1024},),
        ({"vertical_tokens": 256, "slash_tokens": 512},),
    ),
}
QUICK = ("dense", "pbs 0.9", "pbs 0.8", "mean_pooling 0.9")


class UnknownSettingError(ValueError):
    """This client does not have the method or an option of a setting."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method with its options, and the options that all methods share."""

    method: str
    class_name: str
    options: dict[str, Any]
    tail_blocks: int = 0
    corrected: bool = False

    @property
    def name(self) -> str:
        """Such as "pbs 0.9, tail 1, corrected"."""
        values = "/".join(f"{value:g}" for value in self.options.values())
        parts = [f"{self.method} {values}".rstrip()]
        parts += [f"tail {self.tail_blocks}"] if self.tail_blocks else []
        parts += ["corrected"] if self.corrected else []
        return ", ".join(parts)

    def attention(self) -> Attention:
        """Options of the client.

        Raises:
            UnknownSettingError: it does not have them.
        """
        method = getattr(pbs_client, self.class_name, None)
        if method is None:
            raise UnknownSettingError(f"the client has no {self.class_name}")
        known = {field.name for field in dataclasses.fields(Attention)}
        shared: dict[str, Any] = {}
        if self.method != DENSE:
            wanted = {"dense_tail_blocks": self.tail_blocks, "mean_correction": self.corrected}
            # Without the option there is nothing to switch off.
            shared = {name: v for name, v in wanted.items() if v or name in known}
        try:
            return Attention(method(**self.options), **shared)
        except (TypeError, ValueError) as error:
            raise UnknownSettingError(f"the client refuses it: {error}") from error


def all_settings(more: bool = True) -> list[Setting]:
    """Dense first, then the grid: its core, and with `more` the whole of it."""
    settings = [Setting(DENSE, "Dense", {})]
    for method, family in GRID.items():
        tried = family.core + (family.more if more else ())
        for options, tail, corrected in itertools.product(tried, TAILS, CORRECTIONS):
            settings.append(Setting(method, family.class_name, options, tail, corrected))
    return settings
