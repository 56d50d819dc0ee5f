"""Peak memory of one step: the allocator's on CUDA, the process's resident memory on Linux, unknown elsewhere."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"


class Memory(NamedTuple):
    """Bytes.

    Attributes:
        peak: Most that was held during the step: on CUDA by tensors, on the CPU by the whole process.
        rise: How far that is above what was held when the step began.
    """

    peak: int
    rise: int


def step_memory(device: str, step: Callable[[], object]) -> Memory | None:
    """Runs `step` once; `None` where the peak cannot be read.

    Resident memory counts whole pages, keeps what the C library has not handed back, and includes libraries; it is
    good to some MB.
    """
    gc.collect()
    if device == "cuda":
        return _on_cuda(step)
    before = _resident_after_reset()
    step()
    if before is None:
        return None
    peak = _status("VmHWM")
    return Memory(peak, max(0, peak - before))


def _on_cuda(step: Callable[[], object]) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return Memory(peak, peak - before)


def _resident_after_reset() -> int | None:
    """Hands free memory back to the system and starts the peak anew."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        return _status("VmRSS")
    except (OSError, AttributeError, ValueError, KeyError):
        return None


def _status(key: str) -> int:
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) * 1024
