"""Which processor the trainer computes on, and what it does with freed memory."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """A region in which the same work gives the same numbers on a GPU too, as far as torch has such kernels.

    A site that repeats a round after a power cut must send the same update. Where there is no deterministic kernel
    torch warns and takes the other. On a CPU there is nothing to do.
    """
    if device.type != "cuda":
        yield
        return
    # Read when cuBLAS starts; without it its results may depend on the streams in use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_on, was_lenient = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_lenient)


def whole_float32(device: torch.device) -> AbstractContextManager[None]:
    """A region in which a GPU's convolutions keep float32's 24 bits; by default cuDNN takes TF32's 11.

    Statistics and scores are made in it, so that they agree with the exported graph's.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


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
