"""Where and how networks are run: the processor, its memory, the numeric precision, and images on their way to it.

Training may run in mixed precision; losses, statistics and scores are always float32.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from edgeflame.cpus import usable_cpus
from edgeflame.errors import UsageError
from edgeflame.images import ImageU8
from edgeflame.methods import Precision

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

_KEPT_BYTES = 1 << 30


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the first CUDA device if there is one, else the CPU; any other name is torch's.

    torch is kept from computing with more threads than there are cores to use.

    Raises:
        UsageError: torch does not know the device or cannot use it here.
    """
    if torch.get_num_threads() > usable_cpus():
        torch.set_num_threads(usable_cpus())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise UsageError(f"device {name!r} cannot be used here ({str(exc).splitlines()[0]})") from exc
    return device


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """A region in which the same work gives the same numbers on a GPU too, as far as torch has such kernels.

    A site that repeats a round after a power cut must send the same update. Where there is no deterministic kernel
    torch warns and uses the other one. On a CPU there is nothing to do.
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


def without_tf32(device: torch.device) -> AbstractContextManager[None]:
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


Autocast = Callable[[], AbstractContextManager[object]]
"""Opens a region in which a network is run."""

full_precision: Autocast = nullcontext


def autocast_for(precision: Precision, device: torch.device) -> Autocast:
    """How networks are run on a device.

    ``auto`` is bfloat16 on a CUDA device with bfloat16 arithmetic, and float32 elsewhere. bfloat16 has float32's range,
    so gradients need no scaling; float16 would.
    """
    if precision == "auto":
        mixed = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        mixed = precision == "bfloat16"
    if not mixed:
        return full_precision
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def rgb_tensor(images_bgr: ImageU8, device: torch.device) -> Tensor:
    """``[N, H, W, 3]`` uint8 BGR to ``[N, 3, H, W]`` float32 RGB 0..255, channels last in memory."""
    batch = torch.from_numpy(images_bgr)
    if device.type == "cuda":
        # From page-locked memory the copy runs beside the GPU's work.
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True).flip(-1).permute(0, 3, 1, 2).float()
