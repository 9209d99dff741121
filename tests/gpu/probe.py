#!/usr/bin/env python3
"""One tile of queries of which every row reads exactly one key: what comes out says which
key and column each value was read from.

    python3 tests/gpu/probe.py chosen|ampere --out FILE.json --seconds N

Keys are codes so far apart that every weight but one is 0. Values hold the number of
their key in one run, of their block of keys in another, of their column in a third. Where
those make no sense, queries that are 0 but for eight columns say where these columns of
the keys were read. What is found is told in words, or in a table where there are none.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable

import torch
from device import DEVICE, watch
from machine import program
from pbs_library import Attention, Library
from progress import Progress, first_line, run_part_of

ROWS, PIECE, BLOCKS = 128, 8, 4  # eight columns are what a swizzle moves
KEYS = BLOCKS * ROWS
REGIONS_MAX = 8
NOWHERE = "no single key"
# Gives o [128, head_dim] and lse [128] of the last block of queries; q, k, v [512, head_dim].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def number_of(o: torch.Tensor, end: int) -> torch.Tensor:
    """The whole number in [0, end) that an output is, or -1."""
    return torch.where((o >= 0) & (o < end) & (o == o.floor()), o, -1.0).long()


def read_values(attend: Attend, head_dim: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and piece of eight columns, [128, head_dim / 8], that rows which should read
    `block` read their values from; -1: none."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(2, (KEYS, head_dim), generator=generator).float() * 2 - 1
    gap = head_dim - (codes @ codes.T - 2 * head_dim * torch.eye(KEYS)).max()
    assert 128 * gap / math.sqrt(head_dim) > 110  # exp(-104) is 0 in f32
    q = torch.zeros(KEYS, head_dim)
    q[-ROWS:] = 128 * codes[block * ROWS : (block + 1) * ROWS]
    number = torch.arange(KEYS)[:, None].expand(-1, head_dim)
    columns = torch.arange(head_dim).expand(KEYS, -1)
    read = [attend(q, codes, v.float())[0] for v in (number % ROWS, number // ROWS, columns)]
    key, of_block, column = (number_of(o, end) for o, end in zip(read, (ROWS, BLOCKS, head_dim)))
    key = torch.where((key < 0) | (of_block < 0), -1, key + of_block * ROWS)
    key, column = (x.view(ROWS, -1, PIECE) for x in (key, column))
    whole = (key == key[..., :1]).all(-1) & (column == column[..., :1] + torch.arange(PIECE)).all(-1)
    whole &= (key[..., 0] >= 0) & (column[..., 0] % PIECE == 0)
    return torch.where(whole, key[..., 0], -1), torch.where(whole, column[..., 0] // PIECE, -1)


def code_of(key, piece):
    """The code, of 128, of a piece of a key. No two pieces differ by what a wrong layout
    moves keys by, 1 to 64; exchanged by the low bits of the key, no two meet."""
    return (key + 10 * (piece % 8) + 3 * (piece // 8)) % ROWS


def read_keys(attend: Attend, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and piece, [128, head_dim / 8], that pieces of the keys of block 0 are read from."""
    pieces = head_dim // PIECE
    bits = (torch.arange(ROWS)[:, None] >> torch.arange(PIECE) & 1).float() * 2 - 1
    k = torch.zeros(KEYS, head_dim)
    for piece in range(pieces):
        k[:ROWS, piece * PIECE : (piece + 1) * PIECE] = bits[code_of(torch.arange(ROWS), piece)]
    v = (torch.arange(KEYS) % ROWS)[:, None].expand(-1, head_dim).float()
    key, of = torch.full((2, ROWS, pieces), -1)
    for piece in range(pieces):
        columns = slice(piece * PIECE, (piece + 1) * PIECE)
        q = torch.zeros_like(k)
        q[-ROWS:, columns] = 1024 * k[:ROWS, columns]
        o, lse = attend(q, k, v)
        # The sum of a row that meets the code it looks for, once.
        met = (lse - PIECE * 1024 / math.sqrt(head_dim)).abs() < 0.1
        for row, found in enumerate(number_of(o, ROWS)[:, 0].tolist()):
            if found >= 0 and met[row]:
                key[found, piece], of[found, piece] = origin_of(row, piece, found, pieces)
    return key, of


@functools.cache
def origin_of(row: int, piece: int, key: int, pieces: int) -> tuple[int, int]:
    """What `key` has to be read from for a query for a piece of key `row` to meet it; what
    a wrong layout does comes first."""
    for moved in (0, *(sign * 2**n for n in (3, 4, 5, 6, 0, 1, 2) for sign in (1, -1))):
        for other in sorted(range(pieces), key=lambda other: other ^ piece):
            if code_of(key + moved, other) == code_of(row, piece):
                return key + moved, other
    return -1, -1


def explain(key: torch.Tensor, piece: torch.Tensor, first: int) -> list[str]:
    """In words what is not as it should be: key `first` + row, and every piece its own."""
    rows, pieces = torch.arange(ROWS)[:, None], torch.arange(key.shape[1])
    known, right_key = key >= 0, key == first + rows
    exchanged = [(piece ^ pieces)[m::8][known[m::8]].unique().tolist() for m in range(8)]
    if (right_key | ~known).all() and known.float().mean() > 0.25 and max(map(len, exchanged)) == 1:
        by = [one[0] for one in exchanged]
        if not any(by) and known.all():
            return []
        if by == [8] * 8:
            return ["the panels of 64 columns are exchanged"]
        if any(by):
            said = " ".join(map(str, by))
            return [f"pieces of 8 columns are exchanged by XOR with {said} by row % 8: another swizzle"]
    # None: nowhere.
    off = [[(k - first - r, p - c) if k >= 0 else None for c, (k, p) in enumerate(zip(*of_row))]
           for r, of_row in enumerate(zip(key.tolist(), piece.tolist()))]  # fmt: skip
    words, told = [], set()
    for r in range(ROWS):
        for c in range(len(pieces)):
            own = off[r][c]
            if (r, c) in told or own == (0, 0):
                continue
            c_end = next((e for e in range(c, len(pieces)) if off[r][e] != own), len(pieces))
            r_end = next((e for e in range(r, ROWS) if off[e][c:c_end] != [own] * (c_end - c)), ROWS)
            told |= {(a, b) for a in range(r, r_end) for b in range(c, c_end)}
            moved = zip(("keys", "columns"), (own[0], own[1] * PIECE) if own else ())
            where = [f"{what} {abs(by)} {'lower' if by < 0 else 'higher'}" for what, by in moved if by]
            words.append(f"rows {r}-{r_end - 1}, columns {c * PIECE}-{c_end * PIECE - 1} read "
                         + (" and ".join(where) or NOWHERE))  # fmt: skip
    if len(words) <= REGIONS_MAX:
        return words
    read = torch.stack([key, piece], -1).tolist()
    lines = (" ".join(f"{k}/{p}" for k, p in of_row) for of_row in read)
    return ["key/piece that each piece reads:", *(f"row {r}: {line}" for r, line in enumerate(lines))]


def probe(attend: Attend, head_dim: int) -> list[str]:
    """What is wrong, in words; nothing when all is right."""
    words, understood = [], True
    for block in reversed(range(BLOCKS)):  # as lists are walked
        found = explain(*read_values(attend, head_dim, block), block * ROWS)
        understood &= len(found) <= REGIONS_MAX and not any(NOWHERE in word for word in found)
        words += [f"values of block {block}: {word}" for word in found]
    if understood:
        return words
    found = explain(*read_keys(attend, head_dim), 0)
    if 0 < len(found) <= REGIONS_MAX and not any(NOWHERE in word for word in found):
        return [f"keys (or queries): {word}" for word in found]
    return words


def run(variant: str, progress: Progress, _: float) -> None:
    """Both head dims of the kernels of a variant."""
    library = Library(program("libpbs_gpu_python.so"))
    for head_dim in (64, 128):
        call = {"kind": "probe", "variant": variant, "head_dim": head_dim}
        if progress.has(**call):
            continue

        def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v = (x[None].bfloat16().to(DEVICE) for x in tensors)
            attention = Attention(library, q, k, v, method="dense", variant=variant)
            attention()
            attention.report()
            return attention.o[0, -ROWS:].float().cpu(), attention.lse[0, -ROWS:].cpu()

        progress.begin(**call)
        watch(5)
        try:
            words = probe(attend, head_dim) or ["all is read from its place"]
        except RuntimeError as error:
            words = [f"not run: {first_line(error)}"]
        progress.end(call | {"says": words})
        for word in words[:40]:
            progress.say(f"one tile, head dim {head_dim}, {variant}: {word}")


if __name__ == "__main__":
    sys.exit(run_part_of(__doc__, {name: functools.partial(run, name) for name in ("chosen", "ampere")}))
