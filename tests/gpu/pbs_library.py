"""The CUDA backend through ctypes (python_library.cc), on torch tensors and streams."""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib

import torch

# kAttentionVariantNames.
VARIANTS = ["chosen", "ampere", "one_section", "without_turns", "more_stages", "fewer_stages"]
METHODS = {"dense": 0, "pbs": 1, "mean_pooling": 2}


class Setting(ctypes.Structure):
    """PbsSetting."""

    _fields_ = [
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
        ("bf16", ctypes.c_int32),
        ("method", ctypes.c_int32),
        ("segment_size", ctypes.c_int32),
        ("threshold", ctypes.c_float),
        ("query_head_scope", ctypes.c_int32),
        ("dense_fallback", ctypes.c_int32),
        ("given_order", ctypes.c_int32),
        ("given_lists", ctypes.c_int32),
        ("variant", ctypes.c_int32),
    ]


class Tensors(ctypes.Structure):
    """PbsTensors."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("q", "k", "v", "o", "lse", "order", "begin", "count", "indices")
    ] + [("num_rows", ctypes.c_int64)]


class Report(ctypes.Structure):
    """PbsReport."""

    _fields_ = [
        ("density", ctypes.c_double),
        ("permute_seconds", ctypes.c_double),
        ("select_seconds", ctypes.c_double),
        ("attend_seconds", ctypes.c_double),
        ("workspace_bytes", ctypes.c_int64),
        ("fell_back", ctypes.c_int32),
    ]


@dataclasses.dataclass
class Lists:
    """Block lists on the device: int64 begin, 16-bit count and indices."""

    begin: torch.Tensor
    count: torch.Tensor
    indices: torch.Tensor

    @staticmethod
    def from_mask(mask: torch.Tensor) -> Lists:
        """Of a bool mask [heads, query blocks, key blocks]."""
        rows = mask.reshape(-1, mask.shape[-1])
        count = rows.sum(1)
        begin = torch.cumsum(count, 0) - count
        indices = rows.nonzero()[:, 1]
        return Lists(begin, count.to(torch.int16), indices.to(torch.int16))


class Library:
    """The loaded library; errors become RuntimeError."""

    def __init__(self, path: pathlib.Path):
        self.functions = ctypes.CDLL(str(path))
        self.functions.PbsError.restype = ctypes.c_char_p
        self.functions.PbsOpen.restype = ctypes.c_void_p
        self.functions.PbsOpen.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        for name in ("PbsRun", "PbsReadReport"):
            getattr(self.functions, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.functions.PbsClose.argtypes = [ctypes.c_void_p]
        self.functions.PbsWorkspaceBytes.restype = ctypes.c_int64
        self.functions.PbsWorkspaceBytes.argtypes = [ctypes.c_void_p]
        self.functions.PbsLendWorkspace.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def fail(self) -> None:
        """Raises what the last call said."""
        raise RuntimeError(self.functions.PbsError().decode())


class Attention:
    """One planned problem: q [H, L, D], k and v [G, L, D], f16 or bf16, one sequence."""

    def __init__(
        self,
        library: Library,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        method: str = "pbs",
        segment_size: int = 256,
        threshold: float = 0.9,
        query_head_scope: bool = False,
        dense_fallback: bool = False,
        order: torch.Tensor | None = None,
        lists: Lists | None = None,
        variant: str = "chosen",
    ):
        self.library = library
        self.kept = (q, k, v, order, lists)
        # Memory that comes from another's output would pass for ours.
        self.o = torch.full_like(q, torch.nan)
        self.lse = torch.empty(q.shape[:2], device=q.device, dtype=torch.float32)
        setting = Setting(
            q.shape[0], k.shape[0], q.shape[2], q.shape[1], int(q.dtype == torch.bfloat16),
            METHODS[method], segment_size, threshold, int(query_head_scope),
            int(dense_fallback), int(order is not None), int(lists is not None),
            VARIANTS.index(variant),
        )  # fmt: skip
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.handle = library.functions.PbsOpen(ctypes.byref(setting), stream)
        if not self.handle:
            library.fail()
        workspace_bytes = library.functions.PbsWorkspaceBytes(self.handle)
        self.workspace = torch.empty(workspace_bytes, device=q.device, dtype=torch.uint8)
        library.functions.PbsLendWorkspace(self.handle, self.workspace.data_ptr())
        at = [t.data_ptr() for t in (q, k, v, self.o, self.lse)]
        at.append(order.data_ptr() if order is not None else None)
        if lists is not None:
            at += [lists.begin.data_ptr(), lists.count.data_ptr(), lists.indices.data_ptr()]
        else:
            at += [None] * 3
        self.tensors = Tensors(*at, len(lists.count) if lists is not None else 0)

    def run(self) -> torch.Tensor:
        """Enqueues one run on the stream of the constructor; gives o."""
        if self.library.functions.PbsRun(self.handle, ctypes.byref(self.tensors)):
            self.library.fail()
        return self.o

    __call__ = run

    def report(self) -> Report:
        """Waits for the last run."""
        report = Report()
        if self.library.functions.PbsReadReport(self.handle, ctypes.byref(report)):
            self.library.fail()
        return report

    def close(self) -> None:
        """Ends the use of the workspace."""
        self.library.functions.PbsClose(self.handle)
        self.handle = None
