"""Which processor the trainer computes on, and what it does with freed memory."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

from edgeflame.errors import UsageError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

_KEPT_BYTES = 1 << 30


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the first CUDA device if there is one, else the CPU; any other name is torch's.

    Raises:
        UsageError: torch does not know the device or cannot use it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        msg = f"device {name!r} cannot be used here ({str(exc).splitlines()[0]})"
        raise UsageError(msg) from exc
    return device


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next batch, where it is glibc.

    By default it hands blocks above 32 MB back to the system at once. Networks on the CPU allocate such blocks for
    every layer of every batch, and having each page given and cleared anew can cost more than the arithmetic.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
