"""Where tensors are and how calls are timed: on the GPU, or in a rehearsal on the CPU,
where our library runs an emulated device and peers are plain torch."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable

import torch
from machine import REHEARSAL

DEVICE = "cpu" if REHEARSAL else "cuda"
# Longer than it takes to enqueue a call, so that no call waits for the host: a millisecond.
AHEAD_CYCLES = 2_000_000


def watch(seconds: float) -> None:
    """Ends the process when what runs now is not over in time. An emulator is slow, and a
    profiler runs a kernel many times."""
    is_slow = REHEARSAL or "kernels" in sys.argv
    faulthandler.dump_traceback_later(seconds * (10 if is_slow else 1), exit=True)


def synchronize() -> None:
    """Waits for the device."""
    if not REHEARSAL:
        torch.cuda.synchronize()


def is_lost() -> bool:
    """Whether a kernel faulted: nothing runs in this process any more."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def milliseconds(call: Callable) -> float:
    """Of one call, on the device."""
    if REHEARSAL:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(AHEAD_CYCLES)
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])
