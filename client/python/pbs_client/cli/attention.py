"""The attention options of `pbs-client`: their flags, and the Attention they make.

A flag is a field of a method's class, of Permute or of Attention (options.py), so these
say which methods have it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbs_client._arguments import checked
from pbs_client.options import METHODS, SCOPES, Attention, Method, Permute


@dataclass(frozen=True)
class _Flag:
    """The flag of the field `name`. `kind` is int, float, str, or bool for a switch."""

    name: str
    kind: type
    metavar: str
    text: str
    choices: Sequence[str] | None = None
    can_negate: bool = True

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def add(self, group: Any, text: str) -> None:
        """Adds the flag to a parser's group. It is None unless it is given."""
        if self.kind is not bool:
            group.add_argument(
                self.option,
                type=self.kind,
                metavar=self.metavar,
                choices=self.choices,
                help=text,
            )
        elif self.can_negate:
            group.add_argument(
                self.option, action=argparse.BooleanOptionalAction, help=text
            )
        else:
            group.add_argument(self.option, action="store_const", const=True, help=text)

    def given(self, value: Any) -> str:
        """The flag as it was given."""
        if self.kind is not bool:
            return f"{self.option} {value}"
        return self.option if value else self.option.replace("--", "--no-", 1)


_OF_METHODS = (
    _Flag("block_size", int, "TOKENS", "a power of two, 16..256 [128]"),
    _Flag(
        "threshold",
        float,
        "SHARE",
        "attention mass to keep, (0, 1]; higher is nearer to dense and slower [0.9; "
        "prism 0.95]",
    ),
    _Flag("force_first_block", bool, "", "every query reads the first block [yes]"),
    _Flag(
        "segment_size",
        int,
        "TOKENS",
        "keys move inside segments of this size, a multiple of the block size [256]",
    ),
    _Flag(
        "scope",
        str,
        "|".join(SCOPES),
        "one key order per KV head or per query head [kv_head]",
        SCOPES,
    ),
    _Flag(
        "stride",
        int,
        "TOKENS",
        "distance of sampled antidiagonals, a power of two, 2..64; higher is faster "
        "and coarser [8]",
    ),
    _Flag("vertical_tokens", int, "TOKENS", "key columns to keep [1000]"),
    _Flag("slash_tokens", int, "TOKENS", "diagonals to keep [6096]"),
    _Flag("gamma", float, "SHARE", "attention mass to keep, (0, 1] [0.95]"),
    _Flag(
        "tau",
        float,
        "DISTANCE",
        "a head selects blocks by their means where these estimate attention with a "
        "distance below this, 0..1 [0.1]",
    ),
    _Flag(
        "fast_threshold",
        float,
        "SHARE",
        "the threshold of the fast rotary pairs alone [--threshold]",
    ),
    _Flag(
        "slow_dims",
        int,
        "COLUMNS",
        "columns of the slow rotary pairs, even [3/4 of the head dim]",
    ),
    _Flag(
        "fast_dims",
        int,
        "COLUMNS",
        "columns of the fast rotary pairs, even [1/2 of the head dim]",
    ),
    _Flag(
        "alpha",
        float,
        "SHARE",
        "keep blocks of this share of the largest score, (0, 1]; higher is faster and "
        "further from dense [0.1]",
    ),
)
_OF_ALL = (
    _Flag(
        "dense_fallback",
        bool,
        "",
        "run dense where nearly all blocks are selected [attend: no; prefill, "
        "generate: yes]",
    ),
    _Flag(
        "coverage_rows",
        int,
        "ROWS",
        "measure the kept attention mass exactly on this many query rows, 0..1024 [0]",
    ),
)
_OF_SELECTION = (
    _Flag(
        "permute",
        bool,
        "",
        "not pbs, which always does: sort keys inside segments; adds --segment-size "
        "and --scope",
        can_negate=False,
    ),
    _Flag(
        "coverage_min",
        float,
        "SHARE",
        "a head whose --coverage-rows rows keep less than this share of the attention "
        "mass reads every block, 0..1 [0]",
    ),
    _Flag(
        "dense_tail_blocks",
        int,
        "N",
        "the last N query blocks read all blocks [attend: 0; prefill with --method: 2]",
    ),
    _Flag("sink_blocks", int, "N", "every query reads the first N blocks [0]"),
    _Flag(
        "window_blocks",
        int,
        "N",
        "every query reads the last N blocks up to its own [0]",
    ),
    _Flag(
        "mean_correction",
        bool,
        "",
        "blocks that are not selected take part with the mean of their keys and "
        "values [no]",
    ),
    _Flag(
        "as_published",
        bool,
        "",
        "only with --method: use the defaults of its published code, and repeat what "
        "that does unlike its paper",
        can_negate=False,
    ),
)
_OF_PREFILL = (
    _Flag(
        "profile",
        str,
        "NAME",
        "a profile of the model instead of a method: `pbs-client models` lists them; "
        "paper is pbs as published",
    ),
    _Flag(
        "threshold_min",
        float,
        "SHARE",
        "the server may lower the threshold to this where the call would else miss its "
        "--timeout, (0, threshold]; the result has the threshold that was used [it may "
        "not]",
    ),
)
_FLAGS = _OF_METHODS + _OF_ALL + _OF_SELECTION + _OF_PREFILL


def option_names() -> tuple[str, ...]:
    """Names of all options but the method's own: what attention_from() takes."""
    return tuple(flag.name for flag in _FLAGS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the groups of attention options to a command."""
    methods = (f"{name:<13} {_summary(kind)}" for name, kind in METHODS.items())
    group = parser.add_argument_group("attention method", "\n".join(methods))
    group.add_argument(
        "--method",
        choices=tuple(METHODS),
        metavar="NAME",
        help="one of these [attend: pbs; prefill: the server's default profile, which "
        "`pbs-client info` prints]",
    )
    group = parser.add_argument_group(
        "options of methods",
        "Refused with a method that does not have them. Defaults are in brackets.",
    )
    for flag in _OF_METHODS:
        is_general = all(_has(kind, flag.name) for kind in METHODS.values())
        owners = "every method" if is_general else _owners(flag.name, "and")
        flag.add(group, f"{owners}: {flag.text}")
    group = parser.add_argument_group(
        "options of every method except dense",
        "In a prefill without --method they change the server's default profile.",
    )
    for flag in _OF_SELECTION:
        lacking = ", ".join(n for n, kind in METHODS.items() if flag.name in kind.lacks)
        flag.add(group, f"not {lacking}: {flag.text}" if lacking else flag.text)
    group = parser.add_argument_group("options of every method")
    for flag in _OF_ALL:
        flag.add(group, flag.text)


def add_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the attention options that only a prefill has."""
    group = parser.add_argument_group("options of prefills")
    for flag in _OF_PREFILL:
        flag.add(group, flag.text)


def attention_from(arguments: argparse.Namespace) -> Attention:
    """The attention that the parsed arguments ask for.

    Raises:
        ValueError: the method does not have an option that is given, the option needs
            a method or excludes another, or its value cannot be sent.
    """
    given = {
        flag.name: checked(flag.kind.__name__, flag.option, value)
        for flag in _FLAGS
        if (value := getattr(arguments, flag.name, None)) is not None
    }
    kind = METHODS[arguments.method] if arguments.method else None
    if "profile" in given:
        _check_profile(given, kind)
    for flag in _FLAGS:
        if flag.name in given and flag not in _OF_PREFILL:
            _check(flag, given, kind)
    method = None if kind is None else kind(**_taken(kind, given))
    if "permute" in given:
        given["permute"] = Permute(**_taken(Permute, given))
    return Attention(method, **_taken(Attention, given))


def _check_profile(given: dict[str, Any], kind: type[Method] | None) -> None:
    """ValueError for a profile without a name, or with what belongs to a method."""
    if not given["profile"]:
        raise ValueError("--profile is empty; `pbs-client models` lists the profiles")
    options = ["--method"] if kind is not None else []
    options += [
        flag.option
        for flag in _FLAGS
        if flag.name in given and _needs_method(flag) and not _sorts(flag, given)
    ]
    if options:
        raise ValueError(f"--profile and {options[0]} exclude each other")


def _needs_method(flag: _Flag) -> bool:
    """Whether the option cannot change a profile."""
    return flag.name not in _fields(Attention) or flag.name == "as_published"


def _sorts(flag: _Flag, given: dict[str, Any]) -> bool:
    """Whether the option is one of --permute, which is given."""
    return "permute" in given and flag.name in _fields(Permute)


def _taken(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The values that are fields of a dataclass."""
    names = _fields(kind)
    return {name: value for name, value in given.items() if name in names}


def _check(flag: _Flag, given: dict[str, Any], kind: type[Method] | None) -> None:
    """ValueError unless the method, None for the server's profile, has the option."""
    sorts = _sorts(flag, given)
    if kind is not None:
        if _has(kind, flag.name) or (sorts and _has(kind, "permute")):
            return
        raise ValueError(
            f"{flag.given(given[flag.name])} is an option of "
            f"{_owners(flag.name, 'and')}; --method {kind.name} does not have it"
        )
    if sorts or not _needs_method(flag):
        return
    raise ValueError(f"{flag.option} needs --method {_owners(flag.name, 'or')}")


def _has(kind: type[Method], name: str) -> bool:
    """Whether the method has the option, without --permute."""
    if any(flag.name == name for flag in _OF_METHODS):
        return name in _fields(kind)
    if name == "permute":
        return kind.selects and not kind.permutes
    if any(flag.name == name for flag in _OF_ALL):
        return True
    return kind.selects and name not in kind.lacks


def _owners(name: str, word: str) -> str:
    """The methods that have the option, as text; `word` comes before the last."""
    names = [method for method, kind in METHODS.items() if _has(kind, name)]
    text = f" {word} ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    if name in _fields(Permute):
        text += f", {word} others with --permute"
    return text


def _fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _summary(kind: type[Method]) -> str:
    """What the method is: the first line of its class."""
    return (kind.__doc__ or "").partition("\n")[0].rstrip(".")
