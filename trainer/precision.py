"""In which precision networks are run in training: whole or mixed. Losses and statistics are always float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from edgeflame.learning import Precision

Autocast = Callable[[], AbstractContextManager[object]]
"""Opens a region in which a network is run."""

full_precision: Autocast = nullcontext


def autocast_for(precision: Precision, device: torch.device) -> Autocast:
    """How networks are run on a device.

    ``auto`` is bfloat16 on a CUDA device that computes in it, and float32 elsewhere. bfloat16 has float32's range,
    so gradients need no scaling; float16 would.
    """
    if precision == "auto":
        mixed = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        mixed = precision == "bfloat16"
    if not mixed:
        return full_precision
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
