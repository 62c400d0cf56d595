"""Which processor the trainer computes on."""

from __future__ import annotations

import torch

from edgeflame.errors import UsageError


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
