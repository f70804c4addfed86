"""The most memory that this process has held, since it began or since a moment: its own, and that on its GPU.

Host memory is the whole process, Python and torch included. Linux lets a process start its high-water mark again; where
that is not so (macOS, some containers), only the mark of its whole life is known, and it never falls.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Peak:
    """Bytes; None is what does not exist, or cannot be told."""

    device: int | None
    """Held by tensors on the GPU; a CPU has no memory beside the host's."""
    host: int | None


def restart_peak(device: torch.device) -> bool:
    """Let `peak_since` count from now on; False where host memory's mark cannot be started again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else glibc keeps what an earlier peak has freed, and this one would drown in it
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_since(device: torch.device, *, restarted: bool) -> Peak:
    """The most held since `restart_peak`, which said whether it had `restarted` host memory's mark."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Peak(on_device, _status("VmHWM") if restarted else None)


def resident() -> int | None:
    """Host memory that the process holds now."""
    return _status("VmRSS")


def peak_of_process() -> int:
    """The most host memory that the process has ever held, as far as the mark was not started again."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _status(name: str) -> int | None:
    try:
        lines = (_PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
