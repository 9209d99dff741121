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
from pbs_client import Attention, Permute

DENSE = "dense"
# Query blocks at the end that read every earlier block. The last block of a prompt may
# be short, so one alone may miss the begin of a question.
TAILS = (0, 2)
CORRECTIONS = (False, True)
WINDOW = 4  # key blocks up to the diagonal that every query block reads
HALF_BLOCKS = {"block_size": 64, "window_blocks": 2 * WINDOW}  # the same tokens
HALF_BLOCKS_TAIL = 3

_SHARED = frozenset(field.name for field in dataclasses.fields(Attention))


def _each(name: str, *values: float, **shared: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: value, **shared} for value in values)


@dataclasses.dataclass(frozen=True)
class Family:
    """A method's class in the client, and the options that are tried.

    `core` is what a run takes by default, `more` what it takes in addition on request.
    `near` is tried with a window and with a dense tail of the longest of TAILS, `half`
    with blocks of half the size. Options that all methods share may be among them.
    """

    class_name: str
    core: tuple[dict[str, Any], ...]
    more: tuple[dict[str, Any], ...] = ()
    near: tuple[dict[str, Any], ...] = ()
    half: tuple[dict[str, Any], ...] = ()


def _near(name: str, *values: float, **shared: Any) -> tuple[dict[str, Any], ...]:
    return _each(name, *values, **{"window_blocks": WINDOW, **shared})


def _half(name: str, *values: float) -> tuple[dict[str, Any], ...]:
    return _each(name, *values, **HALF_BLOCKS)


GRID = {
    "pbs": Family(
        "Pbs",
        _each("threshold", 0.95, 0.9, 0.8),
        _each("threshold", 0.98, 0.7, 0.5),
        _near("threshold", 0.9, 0.8, 0.6, 0.4),
        _half("threshold", 0.8),
    ),
    "mean_pooling": Family(
        "MeanPooling",
        _each("threshold", 0.95, 0.9),
        _each("threshold", 0.8),
        _near("threshold", 0.95, 0.9),
        _half("threshold", 0.95),
    ),
    "xattention": Family(
        "XAttention",
        _each("threshold", 0.95, 0.9),
        _each("threshold", 0.8),
        (
            *_near("threshold", 0.95, 0.9, 0.85, 0.8),
            *_near("threshold", 0.9, window_blocks=2),
            *_near("threshold", 0.9, permute=True),
            *_near("threshold", 0.95, 0.93, **HALF_BLOCKS),
        ),
        _half("threshold", 0.95, 0.9, 0.85, 0.8),
    ),
    "flexprefill": Family(
        "FlexPrefill",
        _each("gamma", 0.95, 0.9),
        _each("gamma", 0.98),
        _near("gamma", 0.95),
    ),
    "prism": Family(
        "Prism",
        _each("threshold", 0.95, 0.9),
        _each("threshold", 0.98),
        _near("threshold", 0.95, 0.9),
        _half("threshold", 0.95),
    ),
    "flashprefill": Family(
        "FlashPrefill",
        _each("alpha", 0.05, 0.1),
        _each("alpha", 0.2),
        _near("alpha", 0.02, 0.05, 0.1, sink_blocks=2),
    ),
    "minference": Family(
        "MInference",
        ({"vertical_tokens": 512, "slash_tokens": 1024},),
        ({"vertical_tokens": 256, "slash_tokens": 512},),
        ({"vertical_tokens": 256, "slash_tokens": 512, "window_blocks": WINDOW},),
    ),
}
QUICK = ("dense", "pbs 0.9", "pbs 0.8", "mean_pooling 0.9")


class UnknownSettingError(ValueError):
    """This client does not have the method or an option of a setting."""


def _part(option: str, value: float) -> str:
    if option == "permute":
        return "permuted"
    return f"{option.removesuffix('_blocks').removesuffix('_size')} {value:g}"


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
        """Such as "pbs 0.9, window 4, tail 2, corrected"."""
        named = {name for name in self.options if name in _SHARED or name == "block_size"}
        own = [value for name, value in self.options.items() if name not in named]
        parts = [f"{self.method} {'/'.join(f'{value:g}' for value in own)}".rstrip()]
        parts += [_part(n, value) for n, value in self.options.items() if n in named]
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
        own = {name: v for name, v in self.options.items() if name not in _SHARED}
        shared = {name: v for name, v in self.options.items() if name in _SHARED}
        if shared.get("permute"):
            shared["permute"] = Permute()
        if self.method != DENSE:
            shared |= {
                "dense_tail_blocks": self.tail_blocks,
                "mean_correction": self.corrected,
            }
        try:
            return Attention(method(**own), **shared)
        except (TypeError, ValueError) as error:
            raise UnknownSettingError(f"the client refuses it: {error}") from error


def all_settings(more: bool = True) -> list[Setting]:
    """Dense first, then the grid: its core, and with `more` the whole of it."""
    settings = [Setting(DENSE, "Dense", {})]
    for method, family in GRID.items():
        tried = family.core + (family.more if more else ())
        grid = itertools.chain(
            itertools.product(tried, TAILS, CORRECTIONS),
            itertools.product(family.near, TAILS[-1:], CORRECTIONS),
            itertools.product(family.half, (HALF_BLOCKS_TAIL,), CORRECTIONS),
        )
        for options, tail, corrected in grid:
            settings.append(Setting(method, family.class_name, options, tail, corrected))
    return settings
