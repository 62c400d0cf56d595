"""Batch norm that stays at its site (FedBN, Li et al. 2021, arXiv 2102.07623).

With ``training.batch_norm = "local"`` every batch norm's scale, shift and statistics are the site's own: they are put
into the global model before it is used, and taken out of an update before it is sent, which then holds the global
model's. Embeddings of different sites are then in different spaces, so their statistics cannot be merged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

PREFIX = "norm."
"""Of their names in a site's private state."""


def norms_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all batch norms' tensors, counters left out: ``PREFIX`` + name to tensor on the CPU."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for key, tensor in module.state_dict().items():
                if key != "num_batches_tracked":
                    found[f"{PREFIX}{name}.{key}"] = tensor.detach().to("cpu", copy=True)
    return found


def put_norms(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put such tensors back; others among ``tensors`` are left alone, and none at all change nothing."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith(PREFIX):
                own[name.removeprefix(PREFIX)].copy_(tensor)
