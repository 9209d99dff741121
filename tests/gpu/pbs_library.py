"""The CUDA backend through ctypes (python_library.cc), on torch tensors and streams."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import pathlib

import torch
from machine import REHEARSAL

METHODS = {
    "dense": 0, "pbs": 1, "mean_pooling": 2, "xattention": 3, "minference": 4,
    "flexprefill": 5, "prism": 6, "flashprefill": 7,
}  # fmt: skip
ALIGNMENT = 256  # of a workspace
INT, LONG, BOOL, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_bool, ctypes.c_void_p
ARGUMENTS = {
    "PbsOpen": [POINTER, *[INT] * 5, BOOL, INT, INT, ctypes.c_float, *[BOOL] * 4],
    "PbsWorkspaceBytes": [POINTER],
    "PbsSetWorkspace": [POINTER, POINTER],
    "PbsLend": [POINTER, LONG],
    "PbsRun": [*[POINTER] * 10, LONG],
    "PbsReadReport": [POINTER, POINTER],
    "PbsHang": [POINTER],
    "PbsClose": [POINTER],
}


@dataclasses.dataclass
class Lists:
    """Block lists on the device: int64 begin, 16-bit count and indices; and their mask."""

    begin: torch.Tensor
    count: torch.Tensor
    indices: torch.Tensor
    mask: torch.Tensor

    @staticmethod
    def from_mask(mask: torch.Tensor) -> Lists:
        """Of a bool mask [heads, query blocks, key blocks]."""
        rows = mask.reshape(-1, mask.shape[-1])
        count = rows.sum(1)
        begin = torch.cumsum(count, 0) - count
        indices = rows.nonzero()[:, 1]
        return Lists(begin, count.to(torch.int16), indices.to(torch.int16), mask)

    def density(self) -> float:
        """Blocks listed, over the causal ones."""
        return self.mask.sum().item() / (self.mask.shape[0] * math.comb(self.mask.shape[-1] + 1, 2))


class Library:
    """The loaded library; errors become RuntimeError."""

    def __init__(self, path: pathlib.Path):
        self.functions = functions = ctypes.CDLL(str(path))
        for function in (functions.PbsError, functions.PbsVariantName, functions.PbsHang):
            function.restype = ctypes.c_char_p
        functions.PbsOpen.restype, functions.PbsWorkspaceBytes.restype = POINTER, LONG
        for name, arguments in ARGUMENTS.items():
            getattr(functions, name).argtypes = arguments
        self.variants: list[str] = []
        while name := functions.PbsVariantName(len(self.variants)):
            self.variants.append(name.decode())

    def check(self, succeeds: object) -> None:
        """Raises what the last call said where it failed."""
        if not succeeds:
            raise RuntimeError(self.functions.PbsError().decode())


class Attention:
    """One planned problem: q [H, L, D], k and v [G, L, D], f16 or bf16, one sequence."""

    def __init__(
        self, library: Library, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
        method: str = "pbs", segment_size: int = 256, threshold: float = 0.9,
        query_head_scope: bool = False, dense_fallback: bool = False,
        order: torch.Tensor | None = None, lists: Lists | None = None, variant: str = "chosen",
    ):  # fmt: skip
        self.library, functions = library, library.functions
        # Memory that comes from another's output would pass for ours.
        self.o = torch.full_like(q, torch.nan)
        self.lse = torch.empty(q.shape[:2], device=q.device, dtype=torch.float32)
        stream = None if REHEARSAL else torch.cuda.current_stream().cuda_stream
        self.handle = functions.PbsOpen(
            stream, library.variants.index(variant), q.shape[0], k.shape[0], q.shape[2],
            q.shape[1], q.dtype == torch.bfloat16, METHODS[method], segment_size, threshold,
            query_head_scope, dense_fallback, order is not None, lists is not None,
        )  # fmt: skip
        library.check(self.handle)
        self.workspace_bytes = functions.PbsWorkspaceBytes(self.handle)
        size = self.workspace_bytes + ALIGNMENT
        self.workspace = torch.empty(size, device=q.device, dtype=torch.uint8)
        begin = -(-self.workspace.data_ptr() // ALIGNMENT) * ALIGNMENT
        functions.PbsSetWorkspace(self.handle, begin)
        tensors = [q, k, v, self.o, self.lse, order]
        tensors += [lists.begin, lists.count, lists.indices] if lists else [None] * 3
        self.kept = [self.workspace, *tensors]
        self.pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.num_rows = len(lists.count) if lists else 0

    def __call__(self) -> torch.Tensor:
        """Enqueues one run on the stream of the constructor; gives o."""
        self.lend()
        done = self.library.functions.PbsRun(self.handle, *self.pointers, self.num_rows) == 0
        self.library.check(done)
        if REHEARSAL:  # nobody else waits for it
            self.report()
        return self.o

    def lend(self, lends: bool = True) -> None:
        """An emulated device touches only what it was lent; a GPU what it likes."""
        for tensor in self.kept:
            if REHEARSAL and tensor is not None:
                self.library.functions.PbsLend(tensor.data_ptr(), tensor.nbytes * lends)

    def report(self) -> dict:
        """Waits for the last run."""
        figures = (ctypes.c_double * 5)()
        self.library.check(self.library.functions.PbsReadReport(self.handle, figures) == 0)
        density, *stages, fell_back = figures
        times = dict(zip(("permute_ms", "select_ms", "attend_ms"), (s * 1e3 for s in stages)))
        return {"density": density, "fell_back": fell_back != 0} | times

    def hang(self) -> str:
        """Where a kernel hangs, with a library whose waits end; else ""."""
        return self.library.functions.PbsHang(self.handle).decode()

    def __del__(self):
        if getattr(self, "handle", None):
            self.lend(False)
            self.library.functions.PbsClose(self.handle)
